"""Bytes of tensors to and from files: positioned reads and writes that never move a shared file position."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from jobs.errors import BadInputError
from workers.files.foreign import open_foreign
from workers.files.layout import TensorSpec
from workers.files.local import file_errors


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file of ours or from outside for reading, and hand out its descriptor.

    Raises:
        As `workers.files.foreign.open_foreign`.
    """
    file = open_foreign(path, any_size=True)
    try:
        yield file.descriptor
    finally:
        file.close()


def read_into(descriptor: int, path: Path, target: torch.Tensor, offset: int) -> None:
    """Fill a contiguous CPU tensor from a file.

    Args:
        descriptor: open for reading.
        path: of the file, for messages.
        target: any dtype and shape; its bytes are filled.
        offset: in bytes, from the start of the file.

    Raises:
        BadInputError: the file ends before.
    """
    view = tensor_bytes(target)
    done = 0
    while done < len(view):
        with file_errors(f"reading {path}", path):
            count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise BadInputError(
                f"{path}: expected {len(view)} bytes at {offset}, found {done}: it was truncated meanwhile"
            )
        done += count


def read_rows(path: Path, spec: TensorSpec, start: int, stop: int, descriptor: int | None = None) -> torch.Tensor:
    """Read rows [start, stop) of a tensor; of a tensor without dimensions, all of it.

    Args:
        path: of the file.
        spec: of the tensor.
        start: first row.
        stop: the row after the last one.
        descriptor: of the file, where it is open already.

    Returns:
        A new CPU tensor [stop - start, ...] of the tensor's dtype.
    """
    shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
    target = torch.empty(shape, dtype=spec.dtype)
    begin = spec.begin + start * spec.row_bytes if spec.shape else spec.begin
    with opened(path) if descriptor is None else contextlib.nullcontext(descriptor) as source:
        read_into(source, path, target, begin)
    return target


def mapped(path: Path, name: str) -> torch.Tensor:
    """Return a tensor of a safetensors file, mapped: its pages are read where they are needed.

    Args:
        path: of the file.
        name: of the tensor.

    Raises:
        BadInputError: the file is not what its header says any more.
    """
    try:
        with opened(path) as descriptor, safe_open(f"/proc/self/fd/{descriptor}", framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise BadInputError(f"{path}: tensor {name} cannot be read: {error}") from error
    return tensor


def read_into_bytes(descriptor: int, path: Path, num_bytes: int, offset: int) -> bytes:
    """Return bytes of a file; raises as `read_into`."""
    target = torch.empty(num_bytes, dtype=torch.uint8)
    read_into(descriptor, path, target, offset)
    return tensor_bytes(target).tobytes()


def write_all(descriptor: int, path: Path, data: memoryview | bytes, offset: int) -> None:
    """Write all bytes at an offset.

    Raises:
        NoCapacityError: the disk is full.
    """
    view = memoryview(data)
    done = 0
    while done < len(view):
        with file_errors(f"writing {path}", path):
            done += os.pwrite(descriptor, view[done:], offset + done)
