"""GGUF files read back: their tensors by the `gguf` package, and what of their metadata does not fit."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType

from jobs.errors import BadInputError
from workers.bases.gguf_files.architectures import ARCHITECTURES
from workers.files.gguf_front import GgufArray, GgufEntry, GgufFront

_NUM_KEPT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTensor:
    """A tensor as the `gguf` package reads it."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """As torch has it."""
    data: np.ndarray
    """uint8 [bytes]: a view of the mapped file."""

    @property
    def words(self) -> str:
        """What it is, for messages."""
        return f"{self.kind.name} of {list(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the `gguf` package finds a tensor."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


_known: OrderedDict[bytes, tuple[_Place, ...]] = OrderedDict()
"""By the digest of a front."""


def read_tensors(path: Path, front: bytes) -> Mapping[str, ReadTensor]:
    """Read the tensors of a file, by name: views of it, whose pages are read where they are needed.

    The package takes seconds for the vocabulary of a file. Where the last files had the very same front, it has said
    where their tensors are, and is not asked again.

    Args:
        path: of the file.
        front: the bytes before its tensors, which are known to be there, as is the size of the file.

    Raises:
        BadInputError: the package cannot read it.
    """
    key = hashlib.sha256(front).digest()
    if key not in _known:
        try:
            found = GGUFReader(path).tensors
        except (ValueError, KeyError, IndexError) as error:
            raise BadInputError(f"{path}: the gguf package cannot read it: {error}") from error
        _known[key] = tuple(
            _Place(
                name=each.name,
                kind=each.tensor_type,
                shape=tuple(int(size) for size in reversed(each.shape.tolist())),
                begin=int(each.data_offset),
                num_bytes=int(each.n_bytes),
            )
            for each in found
        )
        while len(_known) > _NUM_KEPT:
            _known.popitem(last=False)
    data = np.memmap(path, mode="r", dtype=np.uint8)
    return {
        each.name: ReadTensor(kind=each.kind, shape=each.shape, data=data[each.begin : each.begin + each.num_bytes])
        for each in _known[key]
    }


def end_of(entry: GgufEntry, front: GgufFront) -> int | None:
    """Return where a tensor ends in its file; None where its type is not known, or its rows fall into no blocks."""
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(entry.kind)]
    except (ValueError, KeyError):
        return None
    num_elements = 1
    for each in entry.shape:
        num_elements *= each
    if not entry.shape or entry.shape[-1] % block:
        return None
    return front.num_bytes + entry.offset + num_elements // block * size


def lacking(front: GgufFront) -> list[str]:
    """Return the tensors that a file lacks: of every block, what its architecture asks for, or the first block has."""
    names = {entry.name for entry in front.tensors}
    architecture, depth = front.fields.get("general.architecture"), _depth(front)
    if depth is None:
        return []
    rows = [row for row in ARCHITECTURES.values() if MODEL_ARCH_NAMES[row.arch] == architecture]
    # Where several classes are one architecture, what all of them have.
    asked = set.intersection(*(set(row.required) for row in rows)) if rows else set()
    asked |= {name.removeprefix("blk.0.") for name in names if rows and name.startswith("blk.0.")}
    whole = ("token_embd.weight", "output_norm.weight") if rows else ("token_embd.weight",)
    wanted = [*whole, *(f"blk.{block}.{part}" for block in range(depth) for part in sorted(asked))]
    return [name for name in wanted if name not in names]


def disagreements(front: GgufFront) -> Iterator[tuple[str, str, str]]:
    """Yield what the metadata says otherwise than the tensors have it: a field, what it says, and what is there."""
    fields, by_name = front.fields, {entry.name: entry for entry in front.tensors}
    architecture = fields.get("general.architecture")
    numbers = [int(name.split(".")[1]) for name in by_name if name.startswith("blk.") and name.split(".")[1].isdigit()]
    depth, embedding = _depth(front), by_name.get("token_embd.weight")
    if depth is not None and numbers and max(numbers) + 1 != depth:
        yield f"{architecture}.block_count", str(depth), f"{max(numbers) + 1} blocks"
    if embedding is not None and len(embedding.shape) == 2:
        num_rows, width = embedding.shape
        for key in ("tokens", "scores", "token_type"):
            found = fields.get(f"tokenizer.ggml.{key}")
            if isinstance(found, GgufArray) and found.length != num_rows:
                yield f"tokenizer.ggml.{key}", str(found.length), f"{num_rows} rows of token_embd.weight"
        for key, wanted in (("vocab_size", num_rows), ("embedding_length", width)):
            said = fields.get(f"{architecture}.{key}")
            if said is not None and said != wanted:
                yield f"{architecture}.{key}", str(said), f"{wanted} in token_embd.weight"
    for key, name in (("head_count", "attn_q"), ("head_count_kv", "attn_k")):
        heads, width_of_head = (fields.get(f"{architecture}.attention.{each}") for each in (key, "key_length"))
        entry = by_name.get(f"blk.0.{name}.weight")
        if entry is None or type(heads) is not int or type(width_of_head) is not int or len(entry.shape) != 2:
            continue
        if heads * width_of_head != entry.shape[0]:
            yield f"{architecture}.attention.{key}", str(heads), f"{entry.shape[0]} rows of blk.0.{name}.weight"


def _depth(front: GgufFront) -> int | None:
    found = front.fields.get(f"{front.fields.get('general.architecture')}.block_count")
    return found if type(found) is int and 0 <= found <= len(front.tensors) else None
