"""LoRA and rsLoRA on linear layers, streamed: W + scaling * B @ A, one weight at a time.

PEFT says which modules an adapter changes, with which rank and which scaling; what it has on a linear layer beyond
lora_A and lora_B is left to its own merge.

Source: https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732; `Linear.merge` of peft/tuners/lora/layer.py
in PEFT 0.21. Shape suffixes: O output features, I input features, R rank.
"""

import math
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

from jobs.errors import BadInputError, UnsupportedError
from workers.adapters.adapter import PREFIX, Adapter, LoraDelta, read_tensor
from workers.adapters.config import ADAPTER_CONFIG
from workers.adapters.coverage import Coverage
from workers.adapters.wearing import ADAPTER_NAME
from workers.files.layout import TensorSpec


def plan_lora(adapter: Adapter, coverage: Coverage) -> tuple[LoraDelta, ...]:
    """Find the weights whose merge can be streamed, from headers and configuration.

    Args:
        adapter: of any method; of those other than LoRA, nothing is streamed.
        coverage: what it changes.

    Returns:
        One delta for each of these weights, in module order.

    Raises:
        BadInputError: a scaling is not finite.
        UnsupportedError: a delta is on a module that the model does not call, so that it has no effect unmerged.
    """
    for name in sorted(coverage.bypassed):
        _refuse_delta(adapter, name)
    deltas = []
    for name, layer in coverage.layers.items():
        weight = f"{name}.weight"
        specs = [adapter.tensors.get(f"{PREFIX}{name}.{half}.weight") for half in ("lora_A", "lora_B")]
        if not _is_plain(layer) or weight in coverage.replaced or weight in coverage.tied or None in specs:
            continue
        a_RI, b_OR = specs
        assert a_RI is not None
        assert b_OR is not None
        scaling = float(layer.scaling[ADAPTER_NAME])
        if not math.isfinite(scaling):
            raise BadInputError(f"{adapter.directory / ADAPTER_CONFIG}: the scaling of {name} is {scaling}")
        deltas.append(LoraDelta(weight=weight, a_RI=a_RI, b_OR=b_OR, scaling=scaling))
    return tuple(deltas)


def read_operand(adapter: Adapter, spec: TensorSpec, descriptor: int | None = None) -> torch.Tensor:
    """Read one adapter tensor, lifted to float32 as `PeftModel` does, from its file that may be open already.

    Raises:
        BadInputError: it holds NaN or infinity.
    """
    return read_tensor(adapter.weights_path, spec, descriptor).float()


def _refuse_delta(adapter: Adapter, name: str) -> None:
    # What has no effect gets no gradient: an adapter that was trained on such a module is as it began, B all zeros.
    b_OR = adapter.tensors.get(f"{PREFIX}{name}.lora_B.weight")
    if b_OR is not None and read_tensor(adapter.weights_path, b_OR).count_nonzero():
        raise UnsupportedError(
            f"{adapter.directory}: the model of this base computes with the weight of {name} by itself, past the "
            f"adapter, which so has no effect before it is merged and would have one afterwards; take {name} out of "
            f"target_modules and of {adapter.weights_path.name}"
        )


def _is_plain(layer: Any) -> bool:
    plain: bool = (
        type(layer) is Linear
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER_NAME]
        and not layer.fan_in_fan_out
    )
    return plain
