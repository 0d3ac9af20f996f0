"""Which tensors a merged checkpoint has, and where they go."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch

from jobs.errors import UnsupportedError
from workers.adapters.coverage import Coverage
from workers.bases.forms import QuantizingForm, StoredParts
from workers.files.layout import CheckpointLayout, ShardLayout, Stated, lay_out, lay_out_shard
from workers.merging.base_plan import BasePlan
from workers.merging.output import OutputTensor

_Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor of a file: its name, dtype and shape."""


def output_tensors(
    base: BasePlan, coverage: Coverage, by_peft: Mapping[str, tuple[str, ...]]
) -> tuple[OutputTensor, ...]:
    """Return the tensors of a merged checkpoint in their order: the base's, and what comes apart from them.

    Args:
        base: planned.
        coverage: what the adapter changes.
        by_peft: what PEFT makes, as in `MergePlan`.
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
    return tuple(tensors)


def output_layout(base: BasePlan, tensors: Sequence[OutputTensor], max_shard_size: int | None) -> CheckpointLayout:
    """Return where the tensors of a merged checkpoint go: the base's own layout, where they are as it has them.

    Args:
        base: planned.
        tensors: of the output.
        max_shard_size: bytes of a file, at most, where a request says so.
    """
    if max_shard_size is not None:
        return lay_out(((t.name, t.dtype, t.shape) for t in tensors), max_shard_size, _stated(base))
    as_stored = [(name, spec.dtype, spec.shape) for name, (_, spec) in base.layout.tensors.items()]
    if [(t.name, t.dtype, t.shape) for t in tensors] == as_stored:
        return base.layout
    return lay_out_as_stored(base, tensors)


def lay_out_as_stored(base: BasePlan, tensors: Sequence[OutputTensor]) -> CheckpointLayout:
    """Return a layout of tensors in the files that the base has, in the order they are in."""
    by_shard: dict[str, list[_Entry]] = defaultdict(list)
    for tensor in tensors:
        by_shard[tensor.shard].append((tensor.name, tensor.dtype, tensor.shape))
    shards = (lay_out_shard(name, group, stated=_stated(base)) for name, group in by_shard.items())
    return CheckpointLayout(tuple(shards))


def as_base_layouts(
    base: BasePlan, tensors: Sequence[OutputTensor], changed: Collection[str]
) -> tuple[CheckpointLayout, CheckpointLayout, Mapping[str, StoredParts]]:
    """Lay out a release in the base's own form.

    Args:
        base: planned.
        tensors: of the merged model.
        changed: names of those that an adapter changes, or that come apart from others.

    Returns:
        The release: every stored tensor of the base, and what comes apart. Then, for merged numbers, files of the same
        names with what the base has no bytes of. And the weights among them that are quantized again, by name.

    Raises:
        UnsupportedError: the base is stored in no form, or one that weights are not quantized to again; or one of them
            has another shape than in the base.
    """
    place, form = base.source.directory, base.form
    if form is None:
        raise UnsupportedError(
            f"{place}: the base is stored as plain numbers, so output: as_base says nothing; leave output out"
        )
    requantized = {name: parts for name, parts in base.in_form.items() if name in changed}
    specs = {name: spec for name, (_, spec) in base.layout.tensors.items()}
    stored: dict[str, Sequence[_Entry]] = {}
    for tensor in tensors:
        parts = base.in_form.get(tensor.name)
        if parts is None:
            stored[tensor.name] = [(tensor.name, tensor.dtype, tensor.shape)]
        elif tensor.name not in changed:
            stored[tensor.name] = [(name, specs[name].dtype, specs[name].shape) for name in parts.names]
        else:
            if not isinstance(form, QuantizingForm):
                raise UnsupportedError(
                    f"{place}: the adapter changes {tensor.name}, which is stored in {form.words}, and merged weights "
                    "are not quantized to that form again; request output: 16bit, and quantize that release by the "
                    "form's own tool"
                )
            if tensor.shape != base.by_name[tensor.name].shape:
                raise UnsupportedError(
                    f"{place}: the adapter makes {tensor.name} {list(tensor.shape)}, and in {form.words} it stays "
                    f"{list(base.by_name[tensor.name].shape)}; request output: 16bit"
                )
            again = form.requantized(tensor.name, parts, specs)
            stored[tensor.name] = [(name, *again[name]) for name in parts.names]
    # In the files and the order of the base: parts of one weight may lie apart.
    where = {spec.name: shard.name for shard in base.layout.shards for spec in shard.tensors}
    by_shard: dict[str, list[_Entry]] = {shard.name: [] for shard in base.layout.shards}
    for tensor in tensors:
        for entry in stored[tensor.name]:
            by_shard[where.get(entry[0], tensor.shard)].append(entry)
    output = CheckpointLayout(tuple(_as_before(base, name, group) for name, group in by_shard.items()))
    numbers = [tensor for tensor in tensors if tensor.name in changed or tensor.name not in base.by_name]
    return output, lay_out_as_stored(base, numbers), requantized


def _as_before(base: BasePlan, name: str, tensors: Sequence[_Entry]) -> ShardLayout:
    """Return the layout of a shard: the base's own, where it holds the same."""
    before = next(shard for shard in base.layout.shards if shard.name == name)
    if {spec.name: (spec.dtype, spec.shape) for spec in before.tensors} == {each: tuple(is_) for each, *is_ in tensors}:
        return before
    return lay_out_shard(name, tensors, stated=_stated(base))


def _stated(base: BasePlan) -> dict[str, Stated]:
    return {name: spec.stated for name, (_, spec) in base.layout.tensors.items() if spec.stated}
