"""Everything that is not streamed: PEFT's own merge, one module after the other, over mapped weights.

The model is whole, so state across layers is as PEFT has it everywhere; but its weights are mapped, and only the module
in work and the adapter take memory (docs/decisions/0006-peft-lane.md).
"""

from collections import ChainMap, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from workers.adapters.wearing import put_on, take_off, wrapped_modules
from workers.bases.ties import tied_names
from workers.merging.module_weights import ModuleWeights
from workers.merging.plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedModule:
    """A module that lost its adapter, and what is final with it."""

    name: str | None
    """None for what is final before the first module, and after the last."""
    plain: nn.Module | None
    outputs: Mapping[str, torch.Tensor]
    """Output tensors by name, on the CPU."""


def merge_modules(
    plan: MergePlan,
    weights: ModuleWeights,
    *,
    wrapped: Callable[[PeftModel], None] = lambda _model: None,
    look: Callable[[str, Any], None] = lambda _name, _layer: None,
) -> Iterator[MergedModule]:
    """Merge what the plan leaves to PEFT.

    Args:
        plan: of the job.
        weights: of its base; not changed.
        wrapped: told the model that wears the adapter, before anything is merged.
        look: told the name and the layer of each module before it is merged.

    Yields:
        Each module, merged; every output tensor of the lane is with exactly one of them.

    Raises:
        UnsupportedError, BadInputError: PEFT refuses the adapter, or a tensor of it is missing or left over.
    """
    model = weights.model()
    peft_model = put_on(plan.opened, model, values=True).model
    wrapped(peft_model)
    layers = wrapped_modules(peft_model)
    _untie(model, [layer for name, layer in layers if plan.merges(name)])
    names = [name for name, _ in layers]
    del layers
    due = _when_final(plan, names)
    kept: dict[str, torch.Tensor] = {}

    def final(step: int) -> Iterator[dict[str, torch.Tensor]]:
        for sources, made in due[step]:
            values = {name: kept.pop(name) if name in kept else _value(model, name) for name in sources}
            yield _outputs(plan, sources, made, values)

    for outputs in final(-1):
        yield MergedModule(name=None, plain=None, outputs=outputs)
    wanted = {source for sources in plan.by_peft.values() for source in sources} - plan.tied
    for step, name in enumerate(names):
        # Nothing but the model may hold on to a layer: what it computes stays with it.
        look(name, model.get_submodule(name))
        plain = take_off(plan.opened, peft_model, name, merge=plan.merges(name))
        own = {f"{name}.{key}": tensor for key, tensor in plain.state_dict().items()}
        kept |= {source: own[source] for source in own.keys() & wanted}
        yield MergedModule(name=name, plain=plain, outputs=dict(ChainMap(*final(step))))
        if plan.tied.isdisjoint(own):
            model.set_submodule(name, nn.Identity())  # what it held is free again
    for outputs in final(len(names)):
        yield MergedModule(name=None, plain=None, outputs=outputs)


def _untie(model: PreTrainedModel, layers: Sequence[Any]) -> None:
    """Give layers weights of their own where they share them: a merge of PEFT's writes into what it finds."""
    shared = {id(parameter) for names in tied_names(model).values() for parameter in map(model.get_parameter, names)}
    for layer in layers:
        if isinstance(layer, ModulesToSaveWrapper):
            continue  # it computes with a copy as it is
        for module in layer.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) in shared:
                    setattr(module, key, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _when_final(plan: MergePlan, modules: Sequence[str]) -> Mapping[int, list[tuple[tuple[str, ...], list[str]]]]:
    """Return what is final after each module, as sources and outputs: -1 is before the first.

    Values that several modules share are final when all of them are done; those that lie outside of any are at once.
    """
    steps = {name: step for step, name in enumerate(modules)}

    def step_of(source: str) -> int:
        if source in plan.tied:
            return len(modules)
        owner = source.rpartition(".")[0]
        while owner and owner not in steps:
            owner = owner.rpartition(".")[0]
        return steps.get(owner, -1)

    outputs = defaultdict(list)
    for output, sources in plan.by_peft.items():
        outputs[sources].append(output)
    due = defaultdict(list)
    for sources, names in outputs.items():
        due[max(map(step_of, sources))].append((sources, names))
    return due


def _value(model: PreTrainedModel, name: str) -> torch.Tensor:
    owner, _, key = name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(owner), key)
    return value.detach()


def _outputs(
    plan: MergePlan, sources: Sequence[str], names: Sequence[str], values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    conversions = plan.base.conversions
    group = conversions.group_of.get(sources[0])
    return dict.fromkeys(names, values[sources[0]]) if group is None else conversions.revert(group, values)
