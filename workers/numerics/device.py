"""The device of a worker: which it is, whether it can be used, its streams, and what is raised when it fails."""

import functools
import os
import re
import threading

import torch

from jobs.errors import DeviceLostError
from jobs.text import shown

CHECK_SECONDS = 60.0
"""A GPU that has not multiplied two small matrices by then hangs: its driver is at fault, or another process has it."""
_SIZE = 64

_NO_MEMORY = ("allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
"""In what torch raises as a plain RuntimeError: on the CPU, and of the libraries of CUDA."""
_FAULT = re.compile(
    r"(CUDA|CUDA driver|CUDA NVRTC|cuDNN|cuDNN Frontend|cusolver|cudss) error: "
    r"(?!\S*_STATUS_(NOT_SUPPORTED|INVALID_VALUE|BAD_PARAM))"
)
"""How torch 2.13 begins (ATen/cuda/Exceptions.h); calls that a library itself refuses are the model's."""


def resolve_device(name: str) -> torch.device:
    """Return the device for `cpu`, `cuda` or `auto`.

    Raises:
        DeviceLostError: CUDA was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceLostError("device is 'cuda', but this process sees no CUDA device; set device to 'cpu' or 'auto'")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def device_fault(name: str, *, seconds: float = CHECK_SECONDS) -> str | None:
    """Say why a worker cannot use its device, or None when it can.

    A GPU is asked for memory and for a product that is compared: a driver that does not fit, a device that others hold
    for themselves, and uncorrectable errors of its memory show there. The CPU needs no trial.

    Args:
        name: `cpu`, `cuda`, or `auto` for CUDA where there is any.
        seconds: how long it may take.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return None
    faults: list[str] = []

    def attempt() -> None:
        try:
            _multiply(torch.device("cuda"))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is wrong with the device
            faults.append(f"{type(error).__name__}: {error}")

    # In a thread: a call into a driver that hangs does not come back, and this worker must still say so.
    trial = threading.Thread(target=attempt, name="device-trial", daemon=True)
    trial.start()
    trial.join(seconds)
    if trial.is_alive():
        faults.append(f"no answer within {seconds:.0f} s")
    if not faults:
        return None
    reason = " ".join(faults[0].split())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return f"device 'cuda' cannot be used (CUDA_VISIBLE_DEVICES is {visible}): {reason}"


def is_of_the_device(error: Exception) -> bool:
    """Whether CUDA or one of its libraries failed: its context is of no use any more, nor is this process."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and _FAULT.match(str(error)) is not None
    )


def is_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the device or of the machine."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def raise_of_machine(error: Exception) -> None:
    """Raise an error again that is no fault of a file: memory ran out, or the device failed; return from any other."""
    if is_of_memory(error):
        raise MemoryError(shown(error, 500)) from error
    if is_of_the_device(error):
        raise error


def _multiply(device: torch.device) -> None:
    """Multiply on the device.

    Raises:
        DeviceLostError: the product is wrong.
        Exception: whatever torch raises where it cannot use it.
    """
    ones = torch.ones(_SIZE, _SIZE, device=device)
    product = torch.mm(ones, ones).cpu()
    if not torch.equal(product, torch.full((_SIZE, _SIZE), float(_SIZE))):
        raise DeviceLostError(f"a product of ones is {product.min().item()} to {product.max().item()}, not {_SIZE}")


@functools.cache
def streams_of(device: torch.device, num_threads: int) -> tuple[torch.cuda.Stream, ...]:
    """Return a stream for each thread. They stay, as memory that torch keeps is given out on its own stream alone."""
    return tuple(torch.cuda.Stream(device) for _ in range(num_threads))
