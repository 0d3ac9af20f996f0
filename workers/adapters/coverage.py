"""What an adapter changes in a base, found by PEFT on the base's skeleton: names and shapes, no weights are read."""

import functools
import hashlib
import inspect
import linecache
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from jobs.errors import UnsupportedError
from workers.adapters.adapter import PREFIX, Adapter, read_tensor
from workers.adapters.config import ADAPTER_CONFIG
from workers.adapters.methods import WEIGHED
from workers.adapters.wearing import ADAPTER_NAME, put_on, take_off, wrapped_modules
from workers.bases.ties import tied_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The tensors of the merged model that an adapter decides, by their names in the model."""

    layers: Mapping[str, Any]
    """What PEFT put in the place of a module, by the module's name."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape, once merged, of every tensor that may change; tensors that share their values are there by each name."""
    replaced: frozenset[str]
    """Tensors of the base that the adapter brings values of its own for, such as biases that were trained too; of
    values that several share, all of them."""
    tied: Mapping[str, tuple[str, ...]]
    """For each tensor of the base that shares its values: all names of these values, its own included."""
    untied: frozenset[str]
    """Those of the tied tensors that come apart: base + adapter computes with different values for them."""
    left_alone: frozenset[str]
    """Those of the untied ones that keep the base's values."""
    bypassed: frozenset[str]
    """Modules that an adapter is on and that the model never calls: it computes with their weights by itself."""


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
    own = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = tied_names(model)
    wrapped = put_on(adapter, model, values=False)
    layers = dict(wrapped_modules(wrapped.model))
    ways = {name: _way(adapter, name, layers) for name in tied}
    taken = {
        id(parameter)
        for name, parameter in wrapped.model.named_parameters(remove_duplicate=False)
        if name in wrapped.loaded
    }
    replaced = {name for name, parameter in own.items() if parameter in taken}
    changed = set(replaced)
    bypassed = _bypassed(model, [name for name, layer in layers.items() if isinstance(layer, BaseTunerLayer)])
    for name in layers:
        plain = take_off(adapter, wrapped.model, name, merge=False)
        if any(isinstance(module, BaseTunerLayer) for module in plain.modules()):
            raise UnsupportedError(
                f"{adapter.directory / ADAPTER_CONFIG}: module {name} is trained whole, or single tokens of it, and "
                "holds an adapter as well; PEFT leaves that out when it merges, so the merge is refused"
            )
        changed |= {f"{name}.{key}" for key in plain.state_dict()}
    merged = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    untied = {name for name, names in tied.items() if len({ways[other] for other in names}) > 1}
    return Coverage(
        layers=layers,
        shapes={name: tuple(merged[name].shape) for name in sorted(changed | untied)},
        replaced=frozenset(replaced),
        tied=tied,
        untied=frozenset(untied),
        left_alone=frozenset(name for name in untied - replaced if ways[name] is None),
        bypassed=bypassed,
    )


def _bypassed(model: nn.Module, names: Sequence[str]) -> frozenset[str]:
    """Return the modules whose weight is read by the module that owns them, which never calls them or hands them on.

    An adapter acts when its module is called: there, base + adapter computes what the base alone does. Only the source
    of the owner's class in transformers tells.
    """
    owners: dict[str, Any] = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in names}
    return frozenset(name for name, owner in owners.items() if _reads_alone(owner, name.rpartition(".")[2]))


@functools.cache
def _reads_alone(owner: Any, attribute: str) -> bool:
    module = rf"\bself\.{re.escape(attribute)}\b"
    reads = re.search(rf"{module}\.weight\b(?!\.(?:device|dtype|shape))", _source(owner))
    return bool(reads) and not re.search(rf"{module}(?!\.|\s*=[^=]|\s*:)", _source(owner))


@functools.cache
def _source(owner: Any) -> str:
    own = (each for each in owner.__mro__ if each.__module__.startswith("transformers.models."))
    return "\n".join(map(_class_source, own))


def _class_source(kind: type) -> str:
    """Return what `inspect.getsource` does, less decorators; that parses the whole module, for a fifth of a second."""
    lines = linecache.getlines(inspect.getfile(kind))
    heads = (number for number, line in enumerate(lines) if re.match(rf"class {kind.__qualname__}\b", line))
    begin = next(heads, None)
    return inspect.getsource(kind) if begin is None else "".join(inspect.getblock(lines[begin:]))


def _way(adapter: Adapter, name: str, layers: Mapping[str, Any]) -> object:
    """Return what tells the ways apart in which layers change a parameter that they share; None if none does.

    A merge of PEFT's writes into the shared values, so into each other's; unmerged layers compute each with its own.
    """
    owner = next((owner for owner in layers if name.startswith(f"{owner}.")), None)
    if owner is None:
        return None
    layer = layers[owner]
    tokens = layer.token_adapter if isinstance(layer, TrainableTokensWrapper) else layer
    if isinstance(tokens, TrainableTokensLayer):
        return id(tokens.tied_adapter or tokens)
    if isinstance(layer, ModulesToSaveWrapper):  # a trained copy, or one that PEFT has tied
        return "trained" if getattr(adapter.config, "ensure_weight_tying", False) else owner
    return _matrices(adapter, owner, layer) if ties_by_values(adapter) else owner


def ties_by_values(adapter: Adapter) -> bool:
    """Whether the adapter's values say which parameters stay tied.

    PEFT 0.21 gives tied layers the same two matrices, one of them transposed, but they come apart in training where
    the base is in 16 bits, as each is lifted to float32 by itself.
    """
    config: Any = adapter.config
    return bool(getattr(config, "ensure_weight_tying", False)) and not config.use_dora


def _matrices(adapter: Adapter, owner: str, layer: Any) -> object:
    """Return what a LoRA layer adds to its weight [O, I], as a value that is the same for the same matrices."""
    embeds = isinstance(layer.get_base_layer(), nn.Embedding)
    names = ("lora_embedding_B", "lora_embedding_A") if embeds else ("lora_A.weight", "lora_B.weight")
    specs = [adapter.tensors.get(f"{PREFIX}{owner}.{name}") for name in names]
    if None in specs:
        return owner
    values = [read_tensor(adapter.weights_path, spec).float() for spec in specs if spec is not None]
    a_RI, b_OR = (value.T.contiguous() if embeds else value for value in values)
    digests = (hashlib.sha256(half.numpy().data).hexdigest() for half in (a_RI, b_OR))
    return (*digests, layer.scaling[ADAPTER_NAME])


def _fill_with_zeros(model: nn.Module) -> None:
    """Give a skeleton values that take no memory as long as nothing writes to them: pages that are not there yet."""
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled:
                pages = torch.from_numpy(np.zeros(parameter.numel() * parameter.itemsize, dtype=np.uint8))
                zeros = pages.view(parameter.dtype).view(parameter.shape)
                filled[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
            setattr(module, name, filled[id(parameter)])
