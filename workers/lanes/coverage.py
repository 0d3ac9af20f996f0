"""What an adapter changes in a base, found by PEFT on the base's skeleton: names and shapes, no weights are read."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from jobs.errors import UnsupportedError
from workers.lanes.adapter import ADAPTER_CONFIG, Adapter, put_on, take_off, wrapped_modules
from workers.lanes.methods import WEIGHED


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The tensors of the merged model that an adapter decides, by their names in the model."""

    layers: Mapping[str, Any]
    """What PEFT put in the place of a module, by the module's name."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape, once merged, of every tensor that may change; tensors that share their values are there by each name."""
    replaced: frozenset[str]
    """Tensors of the base that the adapter brings values of its own for, such as biases that were trained too."""
    tied: Mapping[str, tuple[str, ...]]
    """For each tensor of the base that shares its values: all names of these values, its own included."""
    untied: frozenset[str]
    """Those of the tied tensors that come apart."""


def cover(adapter: Adapter, model: PreTrainedModel) -> Coverage:
    """Find what an adapter changes.

    Args:
        adapter: headers and configuration.
        model: skeleton of the base on the meta device; it is wrapped, so it is of no further use.

    Raises:
        UnsupportedError, BadInputError: adapter and base do not fit.
    """
    if adapter.method in WEIGHED:
        _fill_with_zeros(model)
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = tied_names(model)
    wrapped = put_on(adapter, model, values=False)
    layers = dict(wrapped_modules(wrapped.model))
    replaced = {
        owners[id(parameter)]
        for name, parameter in wrapped.model.named_parameters(remove_duplicate=False)
        if name in wrapped.loaded and id(parameter) in owners
    }
    changed = set(replaced)
    for name in layers:
        plain = take_off(adapter, wrapped.model, name, merge=False)
        if any(isinstance(module, BaseTunerLayer) for module in plain.modules()):
            raise UnsupportedError(
                f"{adapter.directory / ADAPTER_CONFIG}: module {name} is trained whole and holds adapters as well; "
                "PEFT leaves those out when it merges, so the merge is refused"
            )
        changed |= {f"{name}.{key}" for key in plain.state_dict()}
    merged = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    untied = {name for names in tied.values() for name in names if len({id(merged[other]) for other in names}) > 1}
    return Coverage(
        layers=layers,
        shapes={name: tuple(merged[name].shape) for name in sorted(changed | untied)},
        replaced=frozenset(replaced),
        tied=tied,
        untied=frozenset(untied),
    )


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names of parameters that stand for the same values, all of them for each."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def _fill_with_zeros(model: nn.Module) -> None:
    """Give a skeleton values that take no memory as long as nobody writes to them: pages that are not there yet."""
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled:
                pages = torch.from_numpy(np.zeros(parameter.numel() * parameter.itemsize, dtype=np.uint8))
                zeros = pages.view(parameter.dtype).view(parameter.shape)
                filled[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
            setattr(module, name, filled[id(parameter)])
