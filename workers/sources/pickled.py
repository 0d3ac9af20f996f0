"""Weights in pickled files, read in a closed process and written again as safetensors.

PyTorch's `weights_only` unpickler makes tensors and nothing else. Should it be fooled one day, the process it runs in
has no credentials, no network and no files but the pickle and the safetensors file (see `confinement.py`).
"""

import io
import json
import os
import pickle
import re
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from jobs.errors import (
    AuthError,
    BadInputError,
    InternalError,
    MergefleetError,
    NoCapacityError,
    TransientIOError,
    UnsupportedError,
)
from workers.files.checkpoint import read_shard
from workers.files.foreign import foreign_file
from workers.files.layout import DTYPE_CODES, lay_out_shard
from workers.files.local import file_errors
from workers.files.tensor_io import tensor_bytes, write_all
from workers.sources.confinement import Ended, Limits, close_in, run_isolated

PICKLED_WEIGHTS = "adapter_model.bin"
CONVERTED_WEIGHTS = "adapter_model.safetensors"

_PROGRAM = "from workers.sources.pickled import main; main()"
SAVE_AGAIN = f"if you trust its source, load it with PEFT and save it again, which writes {CONVERTED_WEIGHTS}"
MOVE_AWAY = "move it elsewhere if the adapter does not need it"
_SLACK_BYTES = 1 << 30
_MAX_SHOWN = 1000
"""Characters of an answer that a message repeats."""

_ANSWERS: dict[str, type[MergefleetError]] = {
    kind.__name__: kind for kind in (AuthError, BadInputError, NoCapacityError, TransientIOError, UnsupportedError)
}


def convert(path: Path, target: Path, *, advice: str = SAVE_AGAIN) -> None:
    """Write the tensors of a pickled state dict to a safetensors file, in a closed process.

    Args:
        path: what `torch.save` wrote.
        target: must not exist. Left half-made when this fails: it belongs into a directory that is thrown away then.
        advice: what to do where it cannot be read, for messages.

    Raises:
        BadInputError: the file is damaged, holds anything but tensors by name, or takes more than a file of its size
            may; the message says what was found.
        UnsupportedError: unpickling would run code, a tensor cannot be stored as safetensors, or processes cannot be
            closed in on this machine.
        NotFoundError, AuthError, TransientIOError, NoCapacityError: files cannot be read or written, by kind of fault.
        InternalError: the process failed by itself.
    """
    with (
        file_errors(f"converting {path}", path),
        foreign_file(path, any_size=True) as pickled,
        target.open("xb") as converted,
    ):
        num_bytes = os.fstat(pickled.fileno()).st_size
        seconds = 120 + num_bytes / (8 << 20)
        descriptor = converted.fileno()
        arguments = [str(descriptor), advice]
        ended = run_isolated(_PROGRAM, arguments, stdin=pickled, descriptors=[descriptor], seconds=seconds)
    if ended.code != 0:
        raise _failure(path, ended, seconds, advice)
    read_shard(target)  # the process is not believed: its file has to be a sound one


def main() -> None:
    """Convert stdin to the descriptor that is the first argument.

    Says on stdout what went wrong, as JSON; the second argument is what to do then.
    """
    descriptor, advice = int(sys.argv[1]), sys.argv[2]
    try:
        with open(0, "rb", closefd=False) as pickled:
            _rehearse()
            num_bytes = os.fstat(0).st_size
            limits = Limits(
                memory_bytes=3 * num_bytes + 2 * _SLACK_BYTES,
                file_bytes=16 * num_bytes + _SLACK_BYTES,
                cpu_seconds=60 + num_bytes // (32 << 20),
            )
            close_in(limits)
            tensors = _read(pickled, advice)
            _check(tensors, limits.file_bytes, advice)
            _write(tensors, descriptor, advice)
    except MergefleetError as error:
        print(json.dumps([type(error).__name__, str(error)]))  # noqa: T201 - the way it answers
        sys.exit(1)


def _rehearse() -> None:
    """Read and write a tensor, so that all imports of a first use are done before no file can be opened."""
    example = io.BytesIO()
    torch.save({"tensor": torch.zeros(2, 2).t()}, example)
    example.seek(0)
    with open(os.devnull, "wb") as target:  # noqa: PTH123 - as the real one
        tensors = _read(example, "")
        _check(tensors, _SLACK_BYTES, "")
        _write(tensors, target.fileno(), "")


def _read(file: BinaryIO, advice: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(str(error), advice) from error
    except MemoryError as error:
        raise _too_large(advice) from error
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise _too_large(advice) from error
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise BadInputError(
            f"expected what torch.save writes, found a file that cannot be read ({reason}); it is truncated or "
            f"damaged: fetch it again, or {advice}"
        ) from error


def _refusal(text: str, advice: str) -> MergefleetError:
    """Return our error for a refusal of weights_only, whose own text advises to do without it."""
    if name := re.search(r"GLOBAL (\S+)", text):
        return UnsupportedError(
            f"expected tensors only, found a pickle that asks for {name[1]}, which could run code and was not run; "
            f"{advice}"
        )
    operand = re.search(r"Unsupported operand \d+", text)
    return BadInputError(
        f"expected what torch.save writes, found no pickle of tensors ({operand[0] if operand else 'refused'}); "
        f"fetch it again, or {advice}"
    )


def _too_large(advice: str) -> MergefleetError:
    return BadInputError(f"its contents take more memory than a file of its size may; {advice}")


def _check(tensors: Any, max_bytes: int, advice: str) -> None:
    if not isinstance(tensors, dict):
        raise BadInputError(
            f"expected a dict of tensors by name, found {type(tensors).__name__}, so that nothing says what in it was "
            f"trained; {advice}"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise BadInputError(
                f"expected tensors by name, found {type(tensor).__name__} under {name!r}; it holds more than "
                f"that, so that nothing says what in it was trained; {advice}"
            )
        if found := _special(tensor):
            raise UnsupportedError(
                f"tensor {name}: expected a dense tensor that safetensors can hold, found {found}; make it a plain "
                f"one, or {advice}"
            )
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if num_bytes > max_bytes:
        raise BadInputError(
            f"expected tensors of at most {max_bytes} bytes in a file of its size, found {num_bytes}; {advice}"
        )


def _special(tensor: torch.Tensor) -> str | None:
    if tensor.is_quantized:
        return f"a quantized one, {tensor.dtype}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"layout {'nested' if tensor.is_nested else tensor.layout}"
    if tensor.device.type != "cpu":
        return f"one on device {tensor.device}"
    return None if tensor.dtype in DTYPE_CODES else f"dtype {tensor.dtype}"


def _write(tensors: Mapping[str, torch.Tensor], descriptor: int, advice: str) -> None:
    layout = lay_out_shard(CONVERTED_WEIGHTS, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    path = Path(CONVERTED_WEIGHTS)
    write_all(descriptor, path, layout.header, 0)
    for spec in layout.tensors:
        try:
            plain = tensors[spec.name].detach().resolve_neg().contiguous()
        except (MemoryError, RuntimeError) as error:
            raise _too_large(advice) from error
        write_all(descriptor, path, tensor_bytes(plain), spec.begin)


def _failure(path: Path, ended: Ended, seconds: float, advice: str) -> MergefleetError:
    if ended.code is None:
        return BadInputError(f"{path}: reading it took more than {seconds:.0f} seconds and was given up; {advice}")
    if ended.code == -signal.SIGTERM:  # no pickle does that: a machine that shuts down does
        return TransientIOError(f"{path}: the process that read it was told to stop")
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        return BadInputError(
            f"{path}: the process that read it was killed ({name}): it takes too much time or memory, or is made to do "
            f"harm; {advice}"
        )
    try:
        kind, words = json.loads(ended.said.splitlines()[-1])
        error, text = _ANSWERS[kind], str(words)
    except (IndexError, KeyError, TypeError, ValueError):
        error, text = InternalError, f"the process that read it ended with {ended.code}: {ended.said}"
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return error(f"{path}: {' '.join(shown.split())[:_MAX_SHOWN]}")
