"""Layouts of safetensors files: every offset is known before the first byte is written."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_OPAQUE_BITS = {
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "C64": 64,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits of an element, by the further codes of safetensors 0.8: nothing is computed with these, so bytes are all they
are. A code beyond both tables is one that safetensors opens no file with."""
CODE_BITS = {code: 8 * dtype.itemsize for code, dtype in DTYPES.items()} | _OPAQUE_BITS
"""Bits of an element, by the code of its dtype."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What a header says of a tensor that is kept as bytes."""

    code: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a shard: what it is, and where its bytes are in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte from the start of the file."""
    stated: Stated | None = None
    """Of a tensor whose dtype is not computed with: it is uint8 [bytes] here, and the header says what it is."""

    @property
    def code(self) -> str:
        """The header's word for its dtype."""
        return self.stated.code if self.stated else DTYPE_CODES[self.dtype]

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Number of bytes."""
        return self.num_elements * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Number of bytes of one row along the first dimension; of a tensor without dimensions, of all of it."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Offset just past the last byte."""
        return self.begin + self.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """One safetensors file: its header's bytes and its tensors in file order."""

    name: str
    header: bytes
    """The 8-byte length and the JSON, as they stand at the start of the file."""
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.tensors[-1].end if self.tensors else len(self.header)


@dataclass(frozen=True)
class CheckpointLayout:
    """All shards of a checkpoint."""

    shards: tuple[ShardLayout, ...]

    @cached_property
    def tensors(self) -> Mapping[str, tuple[ShardLayout, TensorSpec]]:
        """Where each tensor is, by name, in file order."""
        return {spec.name: (shard, spec) for shard in self.shards for spec in shard.tensors}

    @cached_property
    def total_size(self) -> int:
        """Bytes of all tensors: the `total_size` of an index."""
        return sum(spec.num_bytes for _, spec in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.num_bytes for shard in self.shards)

    def index(self) -> dict[str, Any] | None:
        """Return the content of `model.safetensors.index.json`; None for one plain file, and for other formats."""
        names = [shard.name for shard in self.shards]
        if names == [SINGLE_FILE] or not any(name.endswith(".safetensors") for name in names):
            return None
        return {
            "metadata": {"total_size": self.total_size},
            "weight_map": {name: shard.name for name, (shard, _) in sorted(self.tensors.items())},
        }


def file_order(spec: TensorSpec) -> tuple[int, int]:
    """Return what tensors of a file are sorted by."""
    return spec.begin, spec.end


def lay_out(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    max_shard_bytes: int | None,
    stated: Mapping[str, Stated] = MappingProxyType({}),
) -> CheckpointLayout:
    """Lay tensors out in shards, in the order given, with names and headers as `save_pretrained` would use.

    Args:
        tensors: name, dtype and shape of each.
        max_shard_bytes: a shard is closed before it grows beyond this; one larger tensor gets a shard of its own.
            None puts everything into one file.
        stated: what headers say of those that are kept as bytes, by name.

    Returns:
        The layout; offsets are final.
    """
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    num_bytes = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and max_shard_bytes is not None and num_bytes + size > max_shard_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append((name, dtype, shape))
        num_bytes += size
    total = len(groups)
    names = [SINGLE_FILE] if total == 1 else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    return CheckpointLayout(
        tuple(lay_out_shard(name, group, stated=stated) for name, group in zip(names, groups, strict=True))
    )


def lay_out_shard(
    name: str,
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    stated: Mapping[str, Stated] = MappingProxyType({}),
) -> ShardLayout:
    """Lay out one file: widest dtype first, so that every tensor is aligned, then in the order given.

    Args:
        name: of the file.
        tensors: name, dtype and shape of each.
        stated: what the header says of those that are kept as bytes, by name.
    """

    def widest_first(tensor: tuple[str, torch.dtype, tuple[int, ...]]) -> int:
        return -CODE_BITS[stated[tensor[0]].code if tensor[0] in stated else DTYPE_CODES[tensor[1]]]

    tensors = sorted(tensors, key=widest_first)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        said = stated.get(tensor) or Stated(DTYPE_CODES[dtype], shape)
        entries[tensor] = {"dtype": said.code, "shape": list(said.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    header = len(raw).to_bytes(8, "little") + raw
    specs = []
    begin = len(header)
    for tensor, dtype, shape in tensors:
        specs.append(TensorSpec(name=tensor, dtype=dtype, shape=shape, begin=begin, stated=stated.get(tensor)))
        begin = specs[-1].end
    return ShardLayout(name=name, header=header, tensors=tuple(specs))
