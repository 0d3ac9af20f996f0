"""Checkpoints as bytes: safetensors headers read under limits, and layouts whose every offset is known up front.

Format: https://huggingface.co/docs/safetensors, an 8-byte little-endian header length, a JSON header, then the data.
Nothing a header says is believed before it was checked against the file.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jobs.errors import BadInputError, NotFoundError
from jobs.text import shown
from workers.files.foreign import foreign_file, read_foreign
from workers.files.foreign_json import parse_json
from workers.files.layout import (
    CODE_BITS,
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointLayout,
    ShardLayout,
    Stated,
    TensorSpec,
    file_order,
)
from workers.files.local import file_errors

MAX_HEADER_BYTES = 32 << 20
"""Of one file. `MAX_TENSORS` tensors with long names take less; the safetensors library itself takes three times as
much, which as Python objects is more memory than a merge."""
MAX_TENSORS = 200_000
"""Of one file, and of a checkpoint. The largest published ones have 92,000."""
MAX_SHARDS = 10_000
MAX_NAME_LENGTH = 1_000
_MAX_DIMENSIONS = 64
"""Far beyond any tensor; bounds the product of the sizes that a header can ask for."""
_MAX_SHOWN = 200
"""Characters of a malformed value that a message repeats."""
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
"""A file of the checkpoint's own directory, under a name that a release can carry too."""


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        NotFoundError: it is not there.
        BadInputError: it is no JSON, or beyond the bounds of docs/bounds.md.
        AuthError, TransientIOError: it cannot be read, by kind of fault.
    """
    return parse_json(read_foreign(path), path)


def read_shard(path: Path) -> ShardLayout:
    """Read the header of one safetensors file and check it against the file.

    Raises:
        NotFoundError: the file is not there.
        BadInputError: the header is malformed, or does not describe exactly the bytes that are there.
        AuthError, TransientIOError: the file cannot be read, by kind of fault.
    """
    where = shown(path)
    with foreign_file(path, any_size=True) as file, file_errors(f"reading {where}", path):
        num_file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        num_header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or num_header_bytes > num_file_bytes - 8:
            raise BadInputError(
                f"{where}: expected a safetensors header within the file's {num_file_bytes} bytes, found a header "
                f"length of {num_header_bytes}; the file is truncated or no safetensors file"
            )
        if num_header_bytes > MAX_HEADER_BYTES:
            raise BadInputError(
                f"{where}: expected a header of at most {MAX_HEADER_BYTES} bytes, found one of {num_header_bytes}"
            )
        raw = file.read(num_header_bytes)
    # Before it becomes objects, which take twenty times the memory; a header that writes the field otherwise is
    # counted below.
    if (num_tensors := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise BadInputError(f"{where}: expected at most {MAX_TENSORS} tensors, found {num_tensors}")
    entries = parse_json(raw, path, "a JSON header")
    if not isinstance(entries, dict):
        raise BadInputError(f"{path}: expected a JSON object as header, found {type(entries).__name__}")
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise BadInputError(f"{where}: expected at most {MAX_TENSORS} tensors, found {len(entries)}")
    data_begin = 8 + num_header_bytes
    specs = sorted((_read_spec(path, name, entry, data_begin) for name, entry in entries.items()), key=file_order)
    expected_begin = data_begin
    for spec in specs:
        if spec.begin != expected_begin:
            raise BadInputError(
                f"{path}: tensor {spec.name}: expected its bytes to begin at {expected_begin}, the header says "
                f"{spec.begin}; data overlaps or has a hole, the file is corrupt"
            )
        expected_begin = spec.end
    if expected_begin != num_file_bytes:
        raise BadInputError(
            f"{path}: the header describes {expected_begin} bytes, the file has {num_file_bytes}; "
            "it is truncated or corrupt: fetch it again"
        )
    _check_opens(path)
    return ShardLayout(name=path.name, header=prefix + raw, tensors=tuple(specs))


def _check_opens(path: Path) -> None:
    """Have safetensors open a file: a header that no tensor is wrong in may still be none to it, and is shipped."""
    with foreign_file(path, any_size=True) as file:
        try:
            with safe_open(f"/proc/self/fd/{file.fileno()}", framework="np"):
                pass
        except SafetensorError as error:
            raise BadInputError(
                f"{shown(path)}: expected a header that safetensors opens, found: {shown(error, _MAX_SHOWN)}"
            ) from error


def _read_spec(path: Path, name: str, entry: Any, data_begin: int) -> TensorSpec:
    if len(name) > MAX_NAME_LENGTH or shown(name) != name:
        raise BadInputError(
            f"{shown(path)}: tensor {shown(name, 80)}: expected a name of at most {MAX_NAME_LENGTH} visible "
            "characters; the file is corrupt"
        )
    where = f"{shown(path)}: tensor {name}"
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise BadInputError(
            f"{where}: expected dtype, shape and data_offsets, found {shown(entry, _MAX_SHOWN)}"
        ) from error
    if not isinstance(code, str) or code not in CODE_BITS:
        raise BadInputError(
            f"{where}: dtype {shown(repr(code), _MAX_SHOWN)} is unknown to safetensors 0.8, which opens no such file; "
            f"expected one of {', '.join(CODE_BITS)}"
        )
    if len(shape) > _MAX_DIMENSIONS:
        raise BadInputError(f"{where}: expected at most {_MAX_DIMENSIONS} dimensions, found {len(shape)}")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in (*shape, begin, end)):
        found = shown((shape, begin, end), _MAX_SHOWN)
        raise BadInputError(f"{where}: expected whole numbers of 64 bits as shape and offsets, found {found}")
    num_bits = CODE_BITS[code] * math.prod(shape)
    if num_bits != 8 * (end - begin):
        raise BadInputError(
            f"{where}: {code} of shape {list(shape)} takes {math.ceil(num_bits / 8)} bytes, the header gives it "
            f"{end - begin}; the file is corrupt"
        )
    if code in DTYPES:
        return TensorSpec(name=name, dtype=DTYPES[code], shape=shape, begin=data_begin + begin)
    return TensorSpec(
        name=name, dtype=torch.uint8, shape=(end - begin,), begin=data_begin + begin, stated=Stated(code, shape)
    )


def read_checkpoint(directory: Path) -> CheckpointLayout:
    """Read the headers of a checkpoint: `model.safetensors`, or the shards its index names.

    Where both are there, the single file is the checkpoint, as it is for transformers.

    Raises:
        NotFoundError: directory, index or a shard is missing.
        BadInputError: the index names files outside the directory, or does not agree with the shards' headers.
        AuthError, TransientIOError: a file cannot be read, by kind of fault.
    """
    if (directory / SINGLE_FILE).is_file():
        return CheckpointLayout((read_shard(directory / SINGLE_FILE),))
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        raise NotFoundError(
            f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither; mergefleet reads safetensors "
            "checkpoints only: re-save others with save_pretrained"
        )
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(
            f"{index_path}: expected a non-empty object 'weight_map', found {shown(weight_map, _MAX_SHOWN)}"
        )
    for tensor, shard_name in weight_map.items():
        if not isinstance(shard_name, str) or not _SHARD_NAME.fullmatch(shard_name):
            raise BadInputError(
                f"{index_path}: tensor {shown(tensor, _MAX_SHOWN)}: expected the plain name of a safetensors file in "
                f"this directory, found {shown(repr(shard_name), _MAX_SHOWN)}"
            )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise BadInputError(f"{index_path}: expected at most {MAX_SHARDS} files, found {len(names)}")
    layout = CheckpointLayout(_read_shards(directory, names))
    if sum(len(shard.tensors) for shard in layout.shards) != len(layout.tensors):
        raise BadInputError(f"{index_path}: a tensor stands in more than one shard; the checkpoint is ambiguous")
    actual = {name: shard.name for name, (shard, _) in layout.tensors.items()}
    wrong = [name for name in sorted(weight_map | actual) if weight_map.get(name) != actual.get(name)]
    if wrong:
        name = wrong[0]
        raise BadInputError(
            f"{index_path}: {len(wrong)} tensors are not where the index says: {name}: the index says "
            f"{weight_map.get(name, 'nothing')}, the shards say {actual.get(name, 'nothing')}"
        )
    return layout


def _read_shards(directory: Path, names: Sequence[str]) -> tuple[ShardLayout, ...]:
    """Read the headers of a checkpoint's files: each is bounded, and so are all of them together."""
    shards: list[ShardLayout] = []
    num_tensors = num_header_bytes = 0
    for name in names:
        shards.append(read_shard(directory / name))
        num_tensors += len(shards[-1].tensors)
        num_header_bytes += len(shards[-1].header)
        if num_tensors > MAX_TENSORS or num_header_bytes > 2 * MAX_HEADER_BYTES:
            raise BadInputError(
                f"{directory}: expected at most {MAX_TENSORS} tensors and {2 * MAX_HEADER_BYTES} bytes of headers, "
                f"found {num_tensors} and {num_header_bytes} in the first {len(shards)} of {len(names)} files"
            )
    return tuple(shards)
