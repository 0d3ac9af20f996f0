"""What a merge was made with: libraries, and threads, processor and BLAS where its bytes depend on them."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from dataclasses import astuple
from pathlib import Path

import torch

from jobs.locations import LocalPath
from jobs.release import MadeWith
from workers.adapters.methods import REMADE, UNSTABLE
from workers.merging.plan import MergePlan

_NUM_THREADS = 1
"""Of torch while PEFT merges, however many threads a worker has: `workers.numerics.tiles.single_threads`."""

_BLAS_SETTINGS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE")


def made_with(method: str) -> MadeWith | None:
    """Return what a merge by a method was made with, or None for a method whose bytes follow from the request.

    Args:
        method: PEFT's name of it.
    """
    if method not in REMADE and method not in UNSTABLE:
        return None
    settings = "".join(f", {name}={os.environ[name]}" for name in _BLAS_SETTINGS if name in os.environ)
    return MadeWith(
        method=method,
        stable=method not in UNSTABLE,
        num_threads=_NUM_THREADS,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        processor=_processor(),
        blas=_blas() + settings,
    )


@functools.cache
def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bytes of a merge; reading them takes 40 ms."""
    names = (
        "mergefleet",
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "compressed-tensors",
        "gguf",
        "safetensors",
        "numba",
    )
    return {name: importlib.metadata.version(name) for name in names}


def origin_of(plan: MergePlan, device: torch.device) -> str:
    """Return a digest of what decides the bytes of a merge, and its report, besides its merge key.

    Shards of two attempts make one release only where it is the same. Of a local base, whose digest takes samples, the
    state of each file is in it.

    Args:
        plan: of the job.
        device: that merges.
    """
    made, source = made_with(plan.opened.method), plan.base.source
    states = source.states.items() if isinstance(source.location, LocalPath) else ()
    what = {
        "versions": library_versions(),
        "made_with": None if made is None else made.model_dump(mode="json"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "base": sorted((str(path), *astuple(state)) for path, state in states),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.machine()


def _blas() -> str:
    info = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return info[1] if info else "unknown"
