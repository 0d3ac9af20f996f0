"""A release that is one GGUF file: how its tensors are made of merged numbers, and where they go.

Unlike the forms of `storage.py`, names, order and shapes are another library's, a tensor may be made of many (the
experts of a layer), and the front of the file has the vocabulary, too. Merged numbers lie apart, as for every form, and
only those that the base has no bytes of; all else is read from the base.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from jobs.errors import UnsupportedError
from jobs.request import MergeRequest
from workers.bases.forms import StoredParts
from workers.bases.gguf_files.architectures import ADVICE, architecture_of, fields_of
from workers.bases.gguf_files.header import lay_out_file
from workers.bases.gguf_files.tensors import QUANTIZED, GgufTensor, ModelTensor, name_of, tensors_of
from workers.bases.gguf_files.vocabulary import Contents, read_vocabulary
from workers.bases.model import load_config
from workers.files.foreign import read_foreign
from workers.files.layout import CheckpointLayout, ShardLayout
from workers.files.tensor_io import read_rows
from workers.merging.base_plan import BasePlan
from workers.merging.output import OutputTensor
from workers.releases.shipment import Shipment
from workers.sources.belongings import TOKENIZER_CONFIG, TOKENIZER_FILE, is_template


@dataclass(frozen=True, kw_only=True)
class GgufStorage:
    """One GGUF file."""

    words: str
    tensors: tuple[GgufTensor, ...]
    """In the order of the file."""
    apart: frozenset[str]
    """Tensors of the checkpoint whose merged numbers lie apart."""
    declaration: None = None
    """Its configuration declares no form: the file says of each tensor what it is."""

    @cached_property
    def made_anew(self) -> Mapping[str, StoredParts]:
        """What the tensors become that were merged, by their names in the checkpoint."""
        return {
            source: StoredParts(codes=tensor.name, beside={}, shape=None)
            for tensor in self.tensors
            for source in tensor.sources
            if source in self.apart
        }

    def companions(self, name: str) -> tuple[str, ...]:
        """Return a weight alone; see `Storage`. All of them are in one file."""
        return (name,)


def plan_file(
    base: BasePlan, request: MergeRequest, tensors: Sequence[OutputTensor], changed: Collection[str], shipment: Shipment
) -> tuple[GgufStorage, ShardLayout, Sequence[OutputTensor]]:
    """Plan a release that is one GGUF file.

    Args:
        base: planned.
        request: settled.
        tensors: of the merged model.
        changed: names of those that an adapter changes, or that come apart from others.
        shipment: the files that the release takes over.

    Returns:
        How it is made, its layout, and the tensors whose numbers lie apart.

    Raises:
        UnsupportedError: llama.cpp has no such model, or would read it otherwise; says what to do.
        BadInputError: vocabulary and embedding contradict each other.
    """
    place = base.source.directory
    config = load_config(place)
    row = architecture_of(place / "config.json", config)
    if (shape := next((each.shape for each in tensors if each.name == base.embedding), None)) is None:
        raise UnsupportedError(f"{place}: expected an embedding of tokens, found none; {ADVICE}")
    if base.transposed:
        raise UnsupportedError(f"{place}: {min(base.transposed)} is stored transposed; {ADVICE}")
    names = base.conversions.parameter_names
    found = [
        ModelTensor(
            stored=tensor.name, name=names.get(tensor.name, tensor.name), shape=tensor.shape, dtype=tensor.dtype
        )
        for tensor in tensors
    ]
    made = tensors_of(place, row, config, found, QUANTIZED[request.output])
    used = {source for each in made for source in each.sources}
    apart = [each for each in tensors if each.name in used and (each.name in changed or not _is_stored(base, each))]
    vocabulary = read_vocabulary(place, _contents(base, shipment), shape[0])
    file = lay_out_file(name_of(row), fields_of(row, config, shape[0]), vocabulary, made)
    kind = file.name.removeprefix("model-").removesuffix(".gguf")
    storage = GgufStorage(words=f"GGUF ({kind})", tensors=made, apart=frozenset(tensor.name for tensor in apart))
    return storage, file, apart


def read_from(base: BasePlan, merged: CheckpointLayout, merged_in: Path) -> Callable[[str, slice], torch.Tensor]:
    """Return what reads rows of a tensor of the merged checkpoint by its name, as a matrix; a vector is a column.

    Args:
        base: has those that were not merged.
        merged: where the others are.
        merged_in: directory of these.
    """

    def read(name: str, rows: slice) -> torch.Tensor:
        is_merged = name in merged.tensors
        shard, spec = (merged if is_merged else base.layout).tensors[name]
        directory = merged_in if is_merged else base.source.directory
        found = read_rows(directory / shard.name, spec, rows.start, rows.stop)
        return found.view(len(found), -1)

    return read


def _is_stored(base: BasePlan, tensor: OutputTensor) -> bool:
    """Whether the base has the very numbers of a tensor of the release."""
    return tensor.copied and base.by_name.get(tensor.name) == tensor


def _contents(base: BasePlan, shipment: Shipment) -> Contents:
    """Return the files that a vocabulary is made of, as the release has them."""
    wanted = {TOKENIZER_FILE, TOKENIZER_CONFIG, "added_tokens.json", "chat_template.json"}
    found = {"config.json": read_foreign(base.source.directory / "config.json")}
    for name, path in shipment.files.items():
        if name in wanted or is_template(name):
            found[name] = read_foreign(path, num_parts=name.count("/") + 1)
    found |= {name: text.encode() for name, text in shipment.templates.items()}
    return tuple(sorted(found.items()))
