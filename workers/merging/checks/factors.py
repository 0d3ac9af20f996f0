"""Parity of LoRA where the layer cannot be asked: stacked experts, and linears with a forward of their own.

What ships is compared, element by element and one expert after the other, with W + scaling * B @ A in float64.

Source: `ParamWrapper.get_delta_weight` and `Linear.get_delta_weight` of peft/tuners/lora/layer.py in PEFT 0.21. Shape
suffixes: E experts, O output features, I input features, R rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

from workers.adapters.wearing import ADAPTER_NAME
from workers.numerics.rounding import half_ulp


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What one adapter adds to one parameter."""

    key: str
    """Of the parameter in the state of its module."""
    a_ERI: torch.Tensor
    b_ORE: torch.Tensor
    scaling: float
    inputs_first: bool
    """Whether an expert's weight is stored [I, O]."""
    rounds_delta: bool
    """Whether PEFT rounds the delta to the weight's dtype before it adds it."""

    def judge(self, merged: torch.Tensor, weight: torch.Tensor) -> "Judgement":
        """Compare a merged parameter with what it should be.

        Args:
            merged: as it ships, [O, I], or with all experts in the first dimension.
            weight: the base's, of the same shape.

        Returns:
            How far they are apart, in standard deviations of one rounding of each element.
        """
        num_experts = self.a_ERI.shape[0]
        found = Judgement()
        for expert in range(num_experts):
            a_RI, b_OR = self.a_ERI[expert].double(), self.b_ORE[:, :, expert].double()
            delta_OI = (b_OR @ a_RI) * self.scaling
            slack_OI = torch.outer(b_OR.norm(dim=1), a_RI.norm(dim=0)) * abs(self.scaling)
            if self.inputs_first:
                delta_OI, slack_OI = delta_OI.T, slack_OI.T
            shape = delta_OI.shape
            merged_OI = (merged[expert] if merged.dim() == 3 else merged).reshape(shape)
            weight_OI = (weight[expert] if weight.dim() == 3 else weight).reshape(shape).double()
            variance_OI = (2 * half_ulp(merged_OI).double()).square() / 12
            if self.rounds_delta:
                variance_OI += (2 * half_ulp(delta_OI.to(merged.dtype)).double()).square() / 12
            # Besides the roundings, the merge computes the product in float32.
            deviation_OI = variance_OI.sqrt() + 4 * torch.finfo(torch.float32).eps * slack_OI
            error_OI = (merged_OI.double() - weight_OI - delta_OI) / deviation_OI
            found.num_elements += error_OI.numel()
            found.square_sum += float(error_OI.square().sum())
            found.worst = max(found.worst, float(error_OI.abs().max()))
            found.kept += float(((merged_OI.double() - weight_OI) * delta_OI).sum())
            found.delta_square += float(delta_OI.square().sum())
        return found


@dataclass(slots=True)
class Judgement:
    """Errors in standard deviations of one rounding, over all elements of a parameter."""

    num_elements: int = 0
    square_sum: float = 0.0
    worst: float = 0.0
    kept: float = 0.0
    """<merged - W, delta>."""
    delta_square: float = 0.0

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(self.square_sum / self.num_elements) if self.num_elements else 0.0


def factors_of(layer: Any) -> tuple[Factors, ...]:
    """Read the factors of what PEFT put in the place of a module, before they are merged.

    Returns:
        One entry for each parameter; none where the layer adds anything but plain LoRA to a linear weight.
    """
    return tuple(_factors(key, part, times) for key, part, times in _parts(layer))


def _parts(layer: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield each pair of factors in a layer: the parameter it changes, its module, how often it counts."""
    # Two parameters of one module are two wrappers, one in the other.
    while isinstance(layer, ParamWrapper):
        yield layer.parameter_name, layer, 1
        layer = layer.base_layer
    if isinstance(layer, MultiheadAttention):
        yield "in_proj_weight", layer, 1
        # Each call of the layer adds the last projection's delta twice, in training, too: `MultiheadAttention.merge` of
        # PEFT 0.21 adds it, and then lets the projection's own layer merge.
        yield "out_proj.weight", layer.get_base_layer().out_proj, 2
    if type(layer) is Linear and not layer.lora_variant and not layer.fan_in_fan_out:
        yield "weight", layer, 1


def _factors(key: str, part: Any, times: int) -> Factors:
    num_experts = part.num_experts if isinstance(part, ParamWrapper) else 1
    a = part.lora_A[ADAPTER_NAME].weight.detach().clone()
    b = part.lora_B[ADAPTER_NAME].weight.detach().clone()
    return Factors(
        key=key,
        a_ERI=a.reshape(num_experts, -1, a.shape[-1]),
        b_ORE=b.reshape(b.shape[0], -1, num_experts),
        scaling=times * float(part.scaling[ADAPTER_NAME]),
        rounds_delta=isinstance(part, ParamWrapper),
        inputs_first=num_experts > 1 and not part._did_swap_in_out_features,  # noqa: SLF001
    )
