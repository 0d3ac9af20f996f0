"""LoRA on weights as a base's files hold them, where its model has other ones: experts that were linears in training.

transformers 5 makes one parameter of the experts of a layer. PEFT 0.21 converts adapters of single experts to that, but
scales rsLoRA by sqrt(2) too much, ignores ranks and scalings that their configuration gives to experts, and drops what
is on other linears of the same names. No conversion is needed: each delta is added to the weight it was trained on.

Source: https://arxiv.org/abs/2106.09685; `LoraLayer.update_layer` of peft/tuners/lora/layer.py in PEFT 0.21. Shape
suffixes: O output features, I input features, R rank.
"""

import copy
import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from jobs.errors import BadInputError
from workers.adapters.adapter import PREFIX, Adapter, LoraDelta, read_tensor
from workers.adapters.config import ADAPTER_CONFIG
from workers.adapters.names import owner_of
from workers.bases.conversions import Conversions, Group
from workers.files.layout import TensorSpec

_LORA_A, _LORA_B = "lora_A.weight", "lora_B.weight"


def add_to_files(adapter: Adapter, conversions: Conversions, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Take from PEFT what it would convert: plain LoRA on linears that are parts of other weights by now.

    Args:
        adapter: with the names that the base has.
        conversions: of the base.
        shapes: of the linear weights in its files that a delta can be added to, by their names there.

    Returns:
        The adapter, with deltas for all of its plain pairs and a configuration for the rest; as it is where nothing
        in it is named as such a part is.

    Raises:
        BadInputError: a tensor is missing, or of another shape than the configuration and the base say.
    """
    inside: dict[str, set[str]] = defaultdict(set)
    for name in adapter.tensors:
        if (owner := owner_of(name, "lora_")) is not None:
            inside[owner].add(name.removeprefix(f"{PREFIX}{owner}."))
    parts = {name.removesuffix(".weight") for name in conversions.group_behind.keys() & shapes.keys()}
    kinds = {part.rpartition(".")[2] for part in parts}
    config: Any = adapter.config
    deltas: dict[str, LoraDelta] = {}
    if adapter.method == "LORA" and not config.use_dora and any(each.rpartition(".")[2] in kinds for each in inside):
        trained_too = {each.rpartition(".")[0] for each in inside}  # modules with a bias of the adapter's own
        for module in (each for each in inside if each not in trained_too):
            weight = f"{module}.weight"
            stored = weight if module in parts else conversions.stored_names.get(weight)
            if stored is not None and stored in shapes and inside[module] == {_LORA_A, _LORA_B}:
                deltas[stored] = _delta(adapter, module, stored, shapes[stored])
        missing = [part for part in sorted(parts - inside.keys()) if check_target_module_exists(config, part)]
        # Without a single expert, it was trained where they were one parameter already, and none is targeted.
        if missing and not parts.isdisjoint(inside):
            raise BadInputError(
                f"{adapter.weights_path}: expected tensor {PREFIX}{missing[0]}.{_LORA_A} for a module the "
                f"configuration targets, found none ({len(missing)} such modules); the adapter is incomplete or was "
                "trained on another base"
            )
    if not deltas:
        return adapter
    own = {spec.name for delta in deltas.values() for spec in (delta.a_RI, delta.b_OR)}
    rest = {name: spec for name, spec in adapter.tensors.items() if spec.name not in own}
    return dataclasses.replace(adapter, config=_narrowed(config, rest), deltas=deltas, conversions=conversions)


def _delta(adapter: Adapter, module: str, stored: str, shape: tuple[int, ...]) -> LoraDelta:
    config: Any = adapter.config
    a_RI, b_OR = (adapter.tensors[f"{PREFIX}{module}.{half}"] for half in (_LORA_A, _LORA_B))
    rank, alpha = (
        patterns.get(get_pattern_key(patterns.keys(), module), default)
        for patterns, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
    )
    for spec, expected in ((a_RI, (rank, shape[1])), (b_OR, (shape[0], rank))):
        if spec.shape != expected:
            raise BadInputError(
                f"{adapter.weights_path}: tensor {spec.name}: expected shape {list(expected)} for this base and "
                f"configuration, found {list(spec.shape)}; the adapter was trained on another base, or the "
                "configuration is not its own"
            )
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if not math.isfinite(scaling):
        raise BadInputError(f"{adapter.directory / ADAPTER_CONFIG}: the scaling of {module} is {scaling}")
    return LoraDelta(weight=stored, a_RI=a_RI, b_OR=b_OR, scaling=scaling)


def _narrowed(config: Any, rest: Mapping[str, TensorSpec]) -> Any:
    """Return a configuration that targets no module but those of the tensors that are left."""
    config = copy.deepcopy(config)
    owners = {owner_of(name, "lora_") for name in rest if re.search(r"\.lora_[^.]+(\.weight|\.bias)?$", name)}
    config.target_modules = owners or DUMMY_TARGET_MODULES
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return config


def put_on_files(adapter: Adapter, model: PreTrainedModel) -> None:
    """Let modules of a model compute with what the adapter adds to the files that they were loaded from.

    Args:
        adapter: of the model's base.
        model: its weights in memory, none in 4-bit. Each module is put below a layer that merges as PEFT's do.
    """
    conversions = adapter.conversions
    if conversions is None:
        return
    factors = {}
    for name, delta in adapter.deltas.items():
        a_RI, b_OR = (read_tensor(adapter.weights_path, spec).float() for spec in (delta.a_RI, delta.b_OR))
        factors[name] = functools.partial(_product, a_RI, b_OR, delta.scaling)
    by_module: dict[str, dict[str, Callable[[torch.device], torch.Tensor]]] = defaultdict(dict)
    for name, product in factors.items():
        if name not in conversions.group_behind:
            module, _, key = conversions.parameter_names[name].rpartition(".")
            by_module[module][key] = product
            continue
        group = conversions.group_behind[name]
        for parameter in group.parameters:
            module, _, key = parameter.rpartition(".")
            by_module[module][key] = functools.partial(_together, conversions, group, parameter, factors)
    for module, deltas in by_module.items():
        model.set_submodule(module, AddedLayer(model.get_submodule(module), deltas))


def _product(a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float, device: torch.device) -> torch.Tensor:
    return (b_OR.to(device) @ a_RI.to(device)).mul_(scaling)


def _together(
    conversions: Conversions,
    group: Group,
    parameter: str,
    factors: Mapping[str, Callable[[torch.device], torch.Tensor]],
    device: torch.device,
) -> torch.Tensor:
    """Return what is added to a parameter: putting weights together is linear, so deltas go the same way."""

    def read(name: str) -> torch.Tensor:
        if name in factors:
            return factors[name](device)
        return torch.zeros(conversions.stored_shapes[name], device=device)

    return conversions.load(group, read)[parameter]


class AddedLayer(nn.Module, BaseTunerLayer):
    """A module whose parameters have something added to them in each call, as PEFT's layers for experts do it."""

    def __init__(self, base_layer: nn.Module, deltas: Mapping[str, Callable[[torch.device], torch.Tensor]]) -> None:
        """Wrap a module.

        Args:
            base_layer: the module.
            deltas: what is added to its parameters, float32, on a device; by their names in it.
        """
        super().__init__()
        self.base_layer = base_layer
        self._deltas = deltas

    def __getattr__(self, name: str) -> Any:
        """Return what is the module's own: models look into their routers and experts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def enable_adapters(self, enabled: bool) -> None:
        """Add, or leave the module as it is."""
        self._disable_adapters = not enabled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with what is added, in the dtype of the weights."""
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        parameters: dict[str, Any] = self.base_layer._parameters  # noqa: SLF001 - for one call, sums take their places
        own = dict(parameters)
        parameters |= {key: self._sum(key) for key in self._deltas}
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            parameters |= own

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module; with what was added to it if `merge`."""
        del safe_merge, adapter_names
        if merge:
            for key in self._deltas:
                setattr(self.base_layer, key, nn.Parameter(self._sum(key), requires_grad=False))
        return self.base_layer

    def _sum(self, key: str) -> torch.Tensor:
        weight: torch.Tensor = getattr(self.base_layer, key).detach()
        return self._deltas[key](weight.device).add_(weight).to(weight.dtype)
