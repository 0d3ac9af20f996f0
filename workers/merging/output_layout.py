"""Which tensors a merged checkpoint has, and where they go."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from jobs.errors import UnsupportedError
from workers.adapters.coverage import Coverage
from workers.adapters.heads import Head
from workers.files.layout import CheckpointLayout, Stated, lay_out, lay_out_shard
from workers.merging.base_plan import BasePlan
from workers.merging.output import OutputTensor

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor of a file: its name, dtype and shape."""


def output_tensors(
    base: BasePlan, coverage: Coverage, by_peft: Mapping[str, tuple[str, ...]], head: Head | None = None
) -> tuple[OutputTensor, ...]:
    """Return the tensors of a merged checkpoint in their order: the base's, and what comes apart from them.

    Args:
        base: planned.
        coverage: what the adapter changes.
        by_peft: what PEFT makes, as in `MergePlan`.
        head: what takes the place of the base's.

    Raises:
        UnsupportedError: values of the base's head are those of other tensors, too, and stored with it alone.
    """
    names = base.conversions.parameter_names
    added = {sources[0]: output for output, sources in by_peft.items() if output not in base.by_name}
    tensors = []
    for tensor in base.tensors:
        sources = by_peft.get(tensor.name, ())
        whole = len(sources) == 1 and tensor.name in names
        tensors.append(dataclasses.replace(tensor, shape=coverage.shapes[sources[0]]) if whole else tensor)
        # What comes apart from a tensor goes behind it, into the same file.
        tensors += [
            dataclasses.replace(tensor, name=added[other], shape=coverage.shapes[other], stored=None)
            for other in coverage.tied.get(names.get(tensor.name, tensor.name), ())
            if other in added
        ]
    return tuple(tensors) if head is None else _with_head(base, tensors, head)


def _with_head(base: BasePlan, tensors: Sequence[OutputTensor], head: Head) -> tuple[OutputTensor, ...]:
    """Leave the base's head out, and put another one at the end, in the dtype of the last matrix before it."""
    names = base.conversions.stored_names
    dropped = {names[name] for name in head.dropped if name in names}
    for name in head.dropped:
        if alone := [same for same in base.tied.get(name, ()) if same not in head.dropped and same not in names]:
            raise UnsupportedError(
                f"{base.source.directory}: the release is a {head.class_name}, which has no {name}, and the files of "
                f"the base store {alone[0]} under that name alone; save the base anew with save_pretrained"
            )
    kept = [tensor for tensor in tensors if tensor.name not in dropped]
    last = next(tensor for tensor in reversed(kept) if len(tensor.shape) > 1)
    added = (dataclasses.replace(last, name=name, shape=shape, stored=None) for name, shape in head.shapes.items())
    return (*kept, *added)


def output_layout(base: BasePlan, tensors: Sequence[OutputTensor], max_shard_size: int | None) -> CheckpointLayout:
    """Return where the tensors of a merged checkpoint go: the base's own layout, where they are as it has them.

    Args:
        base: planned.
        tensors: of the output.
        max_shard_size: bytes of a file, at most, where a request says so.
    """
    if max_shard_size is not None:
        return lay_out(((t.name, t.dtype, t.shape) for t in tensors), max_shard_size, stated_of(base))
    as_stored = [(name, spec.dtype, spec.shape) for name, (_, spec) in base.layout.tensors.items()]
    if [(t.name, t.dtype, t.shape) for t in tensors] == as_stored:
        return base.layout
    return lay_out_as_stored(base, tensors)


def lay_out_as_stored(base: BasePlan, tensors: Sequence[OutputTensor]) -> CheckpointLayout:
    """Return a layout of tensors in the files that the base has, in the order they are in."""
    by_shard: dict[str, list[Entry]] = defaultdict(list)
    for tensor in tensors:
        by_shard[tensor.shard].append((tensor.name, tensor.dtype, tensor.shape))
    shards = (lay_out_shard(name, group, stated=stated_of(base)) for name, group in by_shard.items())
    return CheckpointLayout(tuple(shards))


def stated_of(base: BasePlan) -> dict[str, Stated]:
    """Return what headers say of tensors that are kept as bytes, by name."""
    return {name: spec.stated for name, (_, spec) in base.layout.tensors.items() if spec.stated}
