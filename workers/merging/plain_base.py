"""A checkpoint in a stored form, written as numbers: for those who read the form otherwise, or not at all."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import GENERATION_CONFIG_NAME

from workers.bases.declarations import without_declarations
from workers.bases.model import config_dtype
from workers.files.checkpoint import read_json
from workers.files.layout import INDEX_FILE, CheckpointLayout
from workers.files.local import file_errors
from workers.files.tensor_io import tensor_bytes, write_all
from workers.merging.base_plan import BasePlan
from workers.merging.base_tiles import tiles_of
from workers.merging.output import OutputTensor
from workers.merging.output_layout import lay_out_as_stored
from workers.merging.plan import MergePlan
from workers.merging.storage import WeightStorage


def plain_layout(base: BasePlan) -> CheckpointLayout:
    """Return where the tensors of a base in a stored form go, as numbers."""
    return lay_out_as_stored(base, _tensors(base))


def misread_in(plan: MergePlan) -> str | None:
    """Name a weight of a release that transformers misreads, so that it is run as numbers; None where it reads all."""
    if not isinstance(plan.storage, WeightStorage) or not plan.storage.in_form:
        return None
    specs = {name: spec for name, (_, spec) in plan.output.tensors.items()}
    return plan.storage.form.misread(specs, config_dtype(plan.base.source.directory))


def is_misread(plan: MergePlan) -> bool:
    """Whether transformers does not read what a release is stored in: it is run as numbers."""
    return misread_in(plan) is not None


def plain_release_bytes(plan: MergePlan) -> int:
    """Return what a release takes of a disk, written as numbers to be run; 0 where it is run as it is.

    What it keeps in more bits, and whether transformers reads it then, is not known before it is merged.
    """
    may_be = plan.request.keep is not None or is_misread(plan)
    return sum(tensor.num_bytes for tensor in plan.tensors) if may_be else 0


def write_plain_release(plan: MergePlan, directory: Path, target: Path, *, device: torch.device) -> None:
    """Write a release in a form as a checkpoint of numbers; see `write_plain_base`.

    Args:
        plan: of it.
        directory: of it: shards, config and the rest.
        target: empty.
        device: where it is dequantized.
    """
    assert isinstance(plan.storage, WeightStorage)
    base, places, in_form = plan.base, plan.output.tensors, plan.storage.in_form
    tensors = tuple(
        dataclasses.replace(
            tensor,
            shard=places[in_form[tensor.name].codes if tensor.name in in_form else tensor.name][0].name,
            stored=None if tensor.name in in_form else places[tensor.name][1],
        )
        for tensor in plan.tensors
    )
    source = dataclasses.replace(base.source, directory=directory)
    form = plan.storage.form
    released = dataclasses.replace(base, source=source, layout=plan.output, tensors=tensors, form=form, in_form=in_form)
    write_plain_base(released, target, device, lambda: None)


def write_plain_base(base: BasePlan, directory: Path, device: torch.device, stop: Callable[[], None]) -> None:
    """Write a base in a stored form as a checkpoint of numbers that transformers loads.

    Args:
        base: the planned base.
        directory: empty.
        device: where it is dequantized.
        stop: called for every tensor; may raise.

    Raises:
        NoCapacityError: the disk is full.
        BadInputError, NotFoundError, TransientIOError: the base cannot be read, by kind of fault.
    """
    quantized = base.stored_weights(device)
    quantized.hold(whole=False)
    layout, tensors = plain_layout(base), {tensor.name: tensor for tensor in _tensors(base)}
    for shard in layout.shards:
        path = directory / shard.name
        with file_errors(f"writing {path}", path), path.open("xb") as file:
            write_all(file.fileno(), path, shard.header, 0)
            for spec in shard.tensors:
                stop()
                offset = spec.begin
                for tile in tiles_of(base, quantized, tensors[spec.name]):
                    data = tensor_bytes(tile.contiguous())
                    write_all(file.fileno(), path, data, offset)
                    offset += len(data)
    documents = {"config.json": without_declarations(read_json(base.source.directory / "config.json"))}
    if (index := layout.index()) is not None:
        documents[INDEX_FILE] = index
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document), encoding="utf-8")
    if (generation := base.source.directory / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(generation, directory / GENERATION_CONFIG_NAME)


def _tensors(base: BasePlan) -> tuple[OutputTensor, ...]:
    """Return the tensors of the base in its own dtype, whatever dtype a release is asked for."""
    own = config_dtype(base.source.directory)
    return tuple(
        dataclasses.replace(tensor, dtype=own if tensor.stored is None else tensor.stored.dtype)
        for tensor in base.tensors
    )
