"""The memory of this process: what is free for it, and what it gives back."""

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Parameters of mallopt(3)."""
_LARGE_BYTES = 4 << 20
_CGROUP = Path("/sys/fs/cgroup")


def release_memory() -> None:
    """Give back the memory of models that are not referred to any more: they hold reference cycles."""
    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_host_bytes() -> int:
    """Return the main memory that this process may still use, within its container.

    Beside a GPU that is what is free, and what torch has pinned: it stays pinned, and is used again.
    """
    available = _meminfo("MemAvailable")
    limits = _CGROUP
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((limits / "memory.max").read_text())
        statistics = dict(line.split() for line in (limits / "memory.stat").read_text().splitlines())
        in_use = int((limits / "memory.current").read_text()) - int(statistics["inactive_file"])
        available = min(available, limit - in_use)
    pinned: int = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) if torch.cuda.is_available() else 0
    return max(available, 0) + pinned


def total_host_bytes() -> int:
    """Return the main memory of this machine, or what its container may have of it."""
    total = _meminfo("MemTotal")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int((_CGROUP / "memory.max").read_text()))
    return total


def _meminfo(name: str) -> int:
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(memory[name].removesuffix("kB")) * 1024


def total_device_bytes(device: torch.device) -> int:
    """Return the memory of a GPU."""
    _, total = torch.cuda.mem_get_info(device)
    return total


def available_device_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that is free for this process: of the driver, and what torch keeps at hand."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def hold_little() -> None:
    """Make malloc map large blocks by themselves, so that they go back when they are freed, and have one heap.

    Left alone, glibc raises the size it maps from to 32 MiB: weights then share the heap with what passes through while
    they are converted, and its holes stay with the process, at worst as large as the model again. And it gives threads
    heaps of their own: every pass has new threads, and what is left in each heap stays, 60 MB after ten passes.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)
    give_back()  # what was left before


def give_back() -> None:
    """Give back to the system what is free in the heap. It takes some milliseconds."""
    ctypes.CDLL(None).malloc_trim(0)
