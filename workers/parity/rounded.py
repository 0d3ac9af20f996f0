"""Base + adapter as one correct rounding leaves it, by PEFT's deltas and torch alone: what no merge can keep.

A delta that is smaller than the steps of the output's dtype is lost in part, in every way to merge it. How far that
alone moves the model is the measure for what a merged checkpoint may lose
(docs/decisions/0018-what-an-adapter-does.md).
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from workers.adapters.adapter import Adapter
from workers.adapters.wearing import ADAPTER_NAME, take_off, wrapped_modules
from workers.bases.conversions import Conversions
from workers.bases.four_bit import of_state
from workers.bases.model import config_dtype, skeleton
from workers.bases.ties import tied_names
from workers.files.checkpoint import read_checkpoint


def output_dtype(merged: Path) -> torch.dtype:
    """Return the dtype that most of a merged checkpoint is stored in, for words about it.

    Raises:
        BadInputError, NotFoundError: it is no checkpoint.
    """
    num_bytes: Counter[torch.dtype] = Counter()
    for shard in read_checkpoint(merged).shards:
        for tensor in shard.tensors:
            if tensor.dtype.is_floating_point:
                num_bytes[tensor.dtype] += tensor.num_bytes
    return num_bytes.most_common(1)[0][0]


def stored_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """Return what the numbers of a checkpoint are stored in, by their names in its model; tied ones by each name.

    Of tensors that are put together of several, the dtype that holds all of them.

    Raises:
        BadInputError, NotFoundError, UnsupportedError: it is no checkpoint of its model.
    """
    model = skeleton(directory)
    stored = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, (_, spec) in read_checkpoint(directory).tensors.items()
        if spec.dtype.is_floating_point
    }
    conversions = Conversions(model, stored)
    dtypes = {name: stored[own].dtype for name, own in conversions.stored_names.items()}
    for group in conversions.groups:
        whole = functools.reduce(torch.promote_types, (stored[name].dtype for name in group.stored))
        dtypes |= dict.fromkeys(group.parameters, whole)
    for names in tied_names(model).values():
        found = [dtypes[name] for name in names if name in dtypes]
        dtypes = dict.fromkeys(names, found[0]) | dtypes if found else dtypes
    return dtypes


def model_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """Return what the numbers of a checkpoint in a stored form are, by their names in its model: of the model's dtype.

    Raises:
        BadInputError, NotFoundError, UnsupportedError: it is no checkpoint.
    """
    return dict.fromkeys(skeleton(directory).state_dict(), config_dtype(directory))


@contextlib.contextmanager
def rounding_as_used(peft_model: PeftModel, dtypes: Mapping[str, torch.dtype], *, everything: bool) -> Iterator[None]:
    """Have a model compute with merged and rounded weights, each made when it is used: no copy of the model is held.

    Args:
        peft_model: wears an adapter that does no more than to add to linear weights; its base may be in 4-bit or
            offloaded. As it was at the end.
        dtypes: of the merged checkpoint, as `stored_dtypes` returns them.
        everything: whether weights without an adapter are rounded, too: where the base is stored in another dtype.
            Those in 4-bit always are, since a merged checkpoint holds them dequantized.
    """
    wrapped = {id(layer.get_base_layer()): layer for layer in peft_model.modules() if isinstance(layer, BaseTunerLayer)}
    with contextlib.ExitStack() as patches:
        # Adapters are switched off: what they add is in the weights.
        patches.enter_context(peft_model.disable_adapter())
        for name, module in peft_model.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer):
                continue  # shows its base layer's weight as its own
            layer: Any = wrapped.get(id(module))
            if (
                layer is not None
                or _is_in_4bit(module)
                or (everything and any(True for _ in module.parameters(recurse=False)))
            ):
                delta = functools.partial(layer.get_delta_weight, ADAPTER_NAME) if layer is not None else None
                own = _dtypes_of(module, name.removesuffix(".base_layer"), dtypes)
                patches.enter_context(_rounding_forward(module, delta, own, everything=everything))
        yield


def merge_and_round(
    adapter: Adapter,
    peft_model: PeftModel,
    dtypes: Mapping[str, torch.dtype],
    *,
    merge_dtypes: Mapping[str, torch.dtype],
) -> None:
    """Merge an adapter into its base by PEFT, and round every weight, those that the adapter brings whole, too.

    Args:
        adapter: that was put on.
        peft_model: wears it; the base's weights are in memory, none in 4-bit. Merged for good afterwards.
        dtypes: of the merged checkpoint, as `stored_dtypes` returns them.
        merge_dtypes: of the base: what PEFT computes a merge in.

    Raises:
        UnsupportedError, BadInputError: PEFT refuses to merge it.
    """
    model = peft_model.get_base_model()
    _untie(model)
    for name, module in wrapped_modules(peft_model):
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            for key, dtype in _dtypes_of(layer, name, merge_dtypes).items():
                parameter = layer.get_parameter(key)
                parameter.data = parameter.data.to(dtype)
        take_off(adapter, peft_model, name, merge=True)
    with torch.no_grad():
        for key, dtype in _dtypes_of(model, "", dtypes).items():
            parameter = model.get_parameter(key)
            parameter.data = parameter.data.to(dtype).float()


def _dtypes_of(module: nn.Module, name: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return the dtypes of a module's parameters. What no file holds, the model makes by itself: it is not rounded."""
    prefix = f"{name}." if name else ""
    return {
        key: dtypes.get(f"{prefix}{key}", torch.float32)
        for key, parameter in module.named_parameters()
        if parameter.is_floating_point() or _is_in_4bit(module)
    }


def _is_in_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


@contextlib.contextmanager
def _rounding_forward(
    module: nn.Module, delta: Callable[[], torch.Tensor] | None, dtypes: Mapping[str, torch.dtype], *, everything: bool
) -> Iterator[None]:
    # accelerate brings the weights of an offloaded module around this one; those in 4-bit are never offloaded.
    name = "_old_forward" if hasattr(module, "_hf_hook") and not _is_in_4bit(module) else "forward"
    before = module.__dict__.get(name)
    original = getattr(module, name)
    if _is_in_4bit(module):
        rounding = functools.partial(_forward_dequantized, module, delta, dtypes["weight"])
    else:
        rounding = functools.partial(_forward_rounded, module, original, delta, dtypes, everything)
    setattr(module, name, rounding)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _forward_rounded(
    module: nn.Module,
    original: Callable[..., Any],
    delta: Callable[[], torch.Tensor] | None,
    dtypes: Mapping[str, torch.dtype],
    everything: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    parameters: dict[str, Any] = module._parameters  # noqa: SLF001 - for one call, tensors take the place of parameters
    own = dict(parameters)
    if everything:
        parameters |= {name: own[name].detach().to(dtype).float() for name, dtype in dtypes.items() if name in own}
    if delta is not None:
        parameters["weight"] = delta().add_(own["weight"]).to(dtypes["weight"]).float()
    try:
        return original(*args, **kwargs)
    finally:
        parameters |= own


def _forward_dequantized(
    module: Any, delta: Callable[[], torch.Tensor] | None, dtype: torch.dtype, x: torch.Tensor
) -> torch.Tensor:
    quantized = of_state(module.weight.data, module.weight.quant_state)
    weight_OI = quantized.dequantize_rows(0, quantized.shape[0]).to(dtype).float()
    if delta is not None:
        weight_OI = delta().add_(weight_OI).to(dtype).float()
    return nn.functional.linear(x, weight_OI, module.bias)


def _untie(model: nn.Module) -> None:
    """Give each tuner layer weights of its own: merged into tied ones, a delta would be in the other module, too."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base_layer = layer.get_base_layer()
            for name, parameter in base_layer.named_parameters(recurse=False):
                if uses[id(parameter)] > 1:
                    setattr(base_layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
