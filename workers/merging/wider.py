"""Releases in a form some of whose weights are kept in more bits: their storage, their layout and their declaration."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jobs.kept import Keep, KeptWeight, KeptWeights
from workers.bases.forms import PartLayout, StoredForm, StoredParts, WideningForm, Wider
from workers.bases.forms.compressed.form import CompressedTensors
from workers.bases.forms.compressed.output import CompressedOutput
from workers.bases.forms.declared import declared, form_of
from workers.files.layout import CheckpointLayout, ShardLayout, lay_out_shard
from workers.merging.at_risk import at_risk
from workers.merging.base_plan import BasePlan
from workers.merging.output_layout import Entry, stated_of
from workers.merging.plan import MergePlan
from workers.merging.storage import BaseStorage, WeightStorage
from workers.merging.stored_layouts import modules_as_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class WiderStorage:
    """A form, but for some weights that are plain numbers or 8-bit integers."""

    inner: WeightStorage
    """The form that was asked for, with all weights in it."""
    kept: Mapping[str, Keep]
    """Weights that are kept in more bits."""
    form: StoredForm
    in_form: Mapping[str, StoredParts]
    """All weights of the release that are codes, those of 8 bits included."""
    declaration: Mapping[str, Any]

    @property
    def words(self) -> str:
        """What people call the form that was asked for."""
        return self.inner.words

    def companions(self, name: str) -> tuple[str, ...]:
        """Return the weights whose numbers decide what a weight is stored as; see `Storage`."""
        return (name,) if name in self.kept else self.inner.companions(name)

    def quantize(self, name: str, read: Callable[[str], torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Quantize a weight, to 8 bits or to the form; see `Storage`."""
        if name not in self.kept:
            return self.inner.quantize(name, read)
        weight = read(name)
        return CompressedOutput.wider(weight.dtype).quantize(name, weight, [weight])

    def before(self, name: str) -> Mapping[str, torch.Tensor] | None:
        """Return what the base stores a weight as, unless that is something else; see `Storage`."""
        return None if name in self.kept else self.inner.before(name)


def kept_in_more_bits(plan: MergePlan) -> KeptWeights | None:
    """Return what a release keeps in more bits than its form has; None where the request does not ask for that."""
    if plan.request.keep is None or not isinstance(plan.storage, WeightStorage):
        return None
    num_plain = sum(each.kept_in is Keep.IN_16_BITS for each in plan.kept_weights)
    return KeptWeights(num_weights=len(plan.storage.in_form) + num_plain, weights=plan.kept_weights)


def most_bytes(plan: MergePlan) -> int:
    """Return the bytes of a release, were all weights kept in 16 bits that may be."""
    num_bytes = plan.output.total_size
    if plan.request.keep is None or not isinstance(plan.storage, WeightStorage):
        return num_bytes
    changed = plan.changed
    for group in at_risk(plan.storage, [name for name in plan.requantized if name in changed]):
        for name in group:
            in_form = (plan.output.tensors[part][1].num_bytes for part in plan.storage.in_form[name].names)
            num_bytes += max(plan.merged.tensors[name][1].num_bytes - sum(in_form), 0)
    return num_bytes


def keeping(plan: MergePlan, weights: Sequence[KeptWeight]) -> MergePlan:
    """Return a plan by which weights are kept in more bits: in another layout, under another declaration.

    Args:
        plan: of the job, or a part of it.
        weights: of the job. Those that the plan keeps by now stay as they are kept.
    """
    before = {each.weight for each in plan.kept_weights}
    new = {each.weight: each for each in weights if each.weight not in before}
    if not new:
        return plan
    assert isinstance(plan.storage, WeightStorage)
    in_8_bits = _parts_in_8_bits(plan, new)
    merged = plan.merged.tensors
    entries: dict[str, Sequence[Entry]] = {
        name: [(part, *each) for part, each in in_8_bits[name][1].items()]
        if name in in_8_bits
        else [(name, merged[name][1].dtype, merged[name][1].shape)]
        for name in new
        if name in merged
    }
    storage = _storage(plan, new, {name: parts for name, (parts, _) in in_8_bits.items()})
    requantized = {name: parts for name, parts in plan.requantized.items() if name not in new}
    requantized |= {name: parts for name, (parts, _) in in_8_bits.items()}
    replaced = {plan.storage.in_form[name].codes: entries[name] for name in entries}
    dropped = {part for name in new for part in plan.storage.in_form[name].names}
    kept = (*plan.kept_weights, *(each for name, each in new.items() if name in merged))
    places = {name: number for number, name in enumerate(merged)}
    shards = (_laid_out(plan.base, each, replaced, dropped) for each in plan.output.shards)
    return dataclasses.replace(
        plan,
        # A file that held nothing but scales of such weights is none any more.
        output=CheckpointLayout(tuple(shard for shard in shards if shard.tensors)),
        requantized={name: requantized[name] for name in merged if name in requantized},
        storage=storage,
        kept_weights=tuple(sorted(kept, key=lambda each: places[each.weight])),
    )


def _laid_out(
    base: BasePlan, shard: ShardLayout, replaced: Mapping[str, Sequence[Entry]], dropped: frozenset[str] | set[str]
) -> ShardLayout:
    """Return the layout of a shard with other tensors in the places of some codes, and without what goes with these."""
    if not any(spec.name in dropped for spec in shard.tensors):
        return shard
    entries: list[Entry] = []
    for spec in shard.tensors:
        if spec.name in replaced:
            entries += replaced[spec.name]
        elif spec.name not in dropped:
            entries.append((spec.name, spec.dtype, spec.shape))
    return lay_out_shard(shard.name, entries, stated=stated_of(base))


def _parts_in_8_bits(
    plan: MergePlan, new: Mapping[str, KeptWeight]
) -> Mapping[str, tuple[StoredParts, Mapping[str, PartLayout]]]:
    found = {}
    for name, each in new.items():
        if each.kept_in is Keep.IN_8_BITS and name in plan.merged.tensors:
            _, spec = plan.merged.tensors[name]
            found[name] = CompressedOutput.wider(spec.dtype).parts(name, spec.shape)
    return found


def _storage(plan: MergePlan, new: Mapping[str, KeptWeight], in_8_bits: Mapping[str, StoredParts]) -> WiderStorage:
    before = plan.storage
    assert isinstance(before, WeightStorage)
    inner = before.inner if isinstance(before, WiderStorage) else before
    found = dict(before.kept) if isinstance(before, WiderStorage) else {}
    found |= {name: each.kept_in for name, each in new.items()}
    left = {**{name: parts for name, parts in before.in_form.items() if name not in new}, **in_8_bits}
    # In one order, whichever piece of a pass was done first: lists in the declaration have it.
    kept = {name: found[name] for name in inner.in_form if name in found}
    in_form = {name: left[name] for name in inner.in_form if name in left}
    assert isinstance(inner.form, WideningForm)
    if not in_form:
        return WiderStorage(inner=inner, kept=kept, form=inner.form, in_form={}, declaration={})
    base = plan.base
    as_numbers = [name for name, keep in kept.items() if keep is Keep.IN_16_BITS]
    wider = Wider(
        as_numbers=[each for name in as_numbers for each in _modules(base, name, of_all=True)],
        in_8_bits=[each for n, keep in kept.items() if keep is Keep.IN_8_BITS for each in _modules(base, n)],
        in_form={name: _modules(base, name) for name in in_form if name not in kept},
        plain=modules_as_numbers(base, plan.tensors, inner.in_form) if isinstance(inner, BaseStorage) else (),
    )
    content = inner.form.declared_with(wider)
    form = _form(inner, base, content)
    return WiderStorage(inner=inner, kept=kept, form=form, in_form=in_form, declaration=content)


def _form(inner: WeightStorage, base: BasePlan, content: Mapping[str, Any]) -> StoredForm:
    """Return the form of a release, to read it by its declaration."""
    form: StoredForm | None
    if isinstance(inner, BaseStorage):
        before = declared(base.source.directory)
        assert before is not None
        form = form_of(dataclasses.replace(before, content=content))
    else:
        form = CompressedTensors.declared("quantization_config", content)
    assert form is not None
    return form


def _modules(base: BasePlan, weight: str, *, of_all: bool = False) -> list[str]:
    """Return the names of the module that a weight is of: in files, and in the model.

    Args:
        base: planned.
        weight: its name in the files.
        of_all: whether also of the module that the model has for it and others, such as all experts of a layer.
    """
    names = [weight]
    names += [base.conversions.parameter_names[weight]] if weight in base.conversions.parameter_names else []
    if of_all and weight in base.conversions.group_behind:
        names += base.conversions.group_behind[weight].parameters
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
