"""Base + adapter as one correct rounding leaves it, by PEFT's deltas and torch alone: what no merge can keep.

A delta that is smaller than the steps of the output's dtype is lost in part, in whatever way it is merged. How far that
alone moves the model is the measure for what a merged checkpoint may lose
(docs/decisions/0018-what-an-adapter-does.md).
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from workers.checkpoint import read_checkpoint
from workers.lanes.adapter import ADAPTER_NAME, Adapter, take_off, wrapped_modules
from workers.quant import of_state


def output_dtype(merged: Path) -> torch.dtype:
    """Return the dtype that most of a merged checkpoint is stored in.

    Raises:
        BadInputError, NotFoundError: it is no checkpoint.
    """
    num_bytes: Counter[torch.dtype] = Counter()
    for shard in read_checkpoint(merged).shards:
        for tensor in shard.tensors:
            if tensor.dtype.is_floating_point:
                num_bytes[tensor.dtype] += tensor.num_bytes
    return num_bytes.most_common(1)[0][0]


@contextlib.contextmanager
def rounding_as_used(peft_model: PeftModel, dtype: torch.dtype, *, everything: bool) -> Iterator[None]:
    """Have a model compute with merged and rounded weights, each made when it is used: no copy of the model is held.

    Args:
        peft_model: wears an adapter that does no more than to add to linear weights; its base may be in 4-bit or
            offloaded. As it was at the end.
        dtype: of the merged checkpoint.
        everything: whether weights without an adapter are rounded, too: where the base is stored in another dtype.
            Those in 4-bit always are, since a merged checkpoint holds them dequantized.
    """
    wrapped = {id(layer.get_base_layer()): layer for layer in peft_model.modules() if isinstance(layer, BaseTunerLayer)}
    with contextlib.ExitStack() as patches:
        # Adapters are switched off: what they add is in the weights.
        patches.enter_context(peft_model.disable_adapter())
        for module in peft_model.get_base_model().modules():
            if isinstance(module, BaseTunerLayer):
                continue  # shows its base layer's weight as its own
            layer: Any = wrapped.get(id(module))
            if (
                layer is not None
                or _is_in_4bit(module)
                or (everything and any(True for _ in module.parameters(recurse=False)))
            ):
                delta = functools.partial(layer.get_delta_weight, ADAPTER_NAME) if layer is not None else None
                patches.enter_context(_rounding_forward(module, delta, dtype, everything=everything))
        yield


def merge_and_round(
    adapter: Adapter, peft_model: PeftModel, dtype: torch.dtype, *, merge_dtype: torch.dtype, everything: bool
) -> None:
    """Merge an adapter into its base by PEFT, and round what comes out.

    Args:
        adapter: that was put on.
        peft_model: wears it; the base's weights are in memory, none in 4-bit. Merged for good afterwards.
        dtype: of the merged checkpoint.
        merge_dtype: of the base: what PEFT computes a merge in.
        everything: whether biases and norms are rounded, too.

    Raises:
        UnsupportedError, BadInputError: PEFT refuses to merge it.
    """
    model = peft_model.get_base_model()
    _untie(model)
    for name, module in wrapped_modules(peft_model):
        if isinstance(module, BaseTunerLayer):
            module.get_base_layer().to(merge_dtype)
        take_off(adapter, peft_model, name, merge=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                wide = parameter.dim() > 1 or everything
                parameter.data = (parameter.to(dtype) if wide else parameter).float()


def _is_in_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


@contextlib.contextmanager
def _rounding_forward(
    module: nn.Module, delta: Callable[[], torch.Tensor] | None, dtype: torch.dtype, *, everything: bool
) -> Iterator[None]:
    # accelerate brings the weights of an offloaded module around this one; those in 4-bit are never offloaded.
    name = "_old_forward" if hasattr(module, "_hf_hook") and not _is_in_4bit(module) else "forward"
    before = module.__dict__.get(name)
    original = getattr(module, name)
    if _is_in_4bit(module):
        rounding = functools.partial(_forward_dequantized, module, delta, dtype)
    else:
        rounding = functools.partial(_forward_rounded, module, original, delta, dtype, everything)
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
    dtype: torch.dtype,
    everything: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    parameters: dict[str, Any] = module._parameters  # noqa: SLF001 - for one call, tensors take the place of parameters
    own = dict(parameters)
    if everything:
        parameters |= {name: _rounded(p, dtype) for name, p in own.items() if p is not None}
    if delta is not None:
        parameters["weight"] = _rounded(delta().add_(own["weight"]), dtype)
    try:
        return original(*args, **kwargs)
    finally:
        parameters |= own


def _forward_dequantized(
    module: Any, delta: Callable[[], torch.Tensor] | None, dtype: torch.dtype, x: torch.Tensor
) -> torch.Tensor:
    quantized = of_state(module.weight.data, module.weight.quant_state)
    weight_OI = _rounded(quantized.dequantize_rows(0, quantized.shape[0]).float(), dtype)
    if delta is not None:
        weight_OI = _rounded(delta().add_(weight_OI), dtype)
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


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype).float() if tensor.is_floating_point() else tensor
