"""The main memory that is left for this process."""

import contextlib
from pathlib import Path


def available_main_memory() -> int:
    """Return the bytes of main memory that this process may still use, within its container."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(memory["MemAvailable"].removesuffix("kB")) * 1024
    limits = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((limits / "memory.max").read_text())
        statistics = dict(line.split() for line in (limits / "memory.stat").read_text().splitlines())
        in_use = int((limits / "memory.current").read_text()) - int(statistics["inactive_file"])
        available = min(available, limit - in_use)
    return max(available, 0)
