"""A release that is one GGUF file: how its tensors are made of merged numbers, and where they go.

Unlike the forms of `storage.py`, names, order and shapes are another library's, a tensor may be made of many (the
experts of a layer), and the front of the file has the vocabulary, too. It is made of the numbers of the whole merge, as
every form that is asked for, so that one merge serves all of them.
"""

from collections.abc import Callable, Mapping, Sequence
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
    declaration: None = None
    """Its configuration declares no form: the file says of each tensor what it is."""

    @cached_property
    def made_anew(self) -> Mapping[str, StoredParts]:
        """What tensors become, by their names in the checkpoint."""
        return {
            source: StoredParts(codes=tensor.name, beside={}, shape=None)
            for tensor in self.tensors
            for source in tensor.sources
        }

    def companions(self, name: str) -> tuple[str, ...]:
        """Return a weight alone; see `Storage`. All of them are in one file."""
        return (name,)


def plan_file(
    base: BasePlan, request: MergeRequest, tensors: Sequence[OutputTensor], shipment: Shipment
) -> tuple[GgufStorage, ShardLayout]:
    """Plan a release that is one GGUF file.

    Args:
        base: planned.
        request: settled.
        tensors: of the merged model.
        shipment: the files that the release takes over.

    Returns:
        How it is made, and its layout.

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
    vocabulary = read_vocabulary(place, _contents(base, shipment), shape[0])
    file = lay_out_file(name_of(row), fields_of(row, config, shape[0]), vocabulary, made)
    kind = file.name.removeprefix("model-").removesuffix(".gguf")
    return GgufStorage(words=f"GGUF ({kind})", tensors=made), file


def read_from(merged: CheckpointLayout, merged_in: Path) -> Callable[[str, slice], torch.Tensor]:
    """Return what reads rows of a tensor of the merged checkpoint by its name, as a matrix; a vector is a column.

    Args:
        merged: where it is.
        merged_in: directory of the shards.
    """

    def read(name: str, rows: slice) -> torch.Tensor:
        shard, spec = merged.tensors[name]
        found = read_rows(merged_in / shard.name, spec, rows.start, rows.stop)
        return found.view(len(found), -1)

    return read


def _contents(base: BasePlan, shipment: Shipment) -> Contents:
    """Return the files that a vocabulary is made of, as the release has them."""
    wanted = {TOKENIZER_FILE, TOKENIZER_CONFIG, "added_tokens.json", "chat_template.json"}
    found = {"config.json": read_foreign(base.source.directory / "config.json")}
    for name, path in shipment.files.items():
        if name in wanted or is_template(name):
            found[name] = read_foreign(path, num_parts=name.count("/") + 1)
    found |= {name: text.encode() for name, text in shipment.templates.items()}
    return tuple(sorted(found.items()))
