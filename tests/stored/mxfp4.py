"""Bases with their experts in MXFP4, as gpt-oss is published."""

from pathlib import Path

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.stored import Quantized, store


def store_mxfp4(base: Path, directory: Path, *, apart: bool = False) -> Path:
    """Store random experts in MXFP4 in the place of a base's own; see `store`.

    Args:
        base: a gpt-oss in 16 bits, in one file; its experts are [E, I, O].
        directory: becomes the base in MXFP4.
        apart: whether scales lie in a shard of their own.
    """
    random = torch.Generator().manual_seed(3)

    def quantize(name: str, weight: torch.Tensor) -> Quantized:
        num_experts, num_inputs, num_outputs = weight.shape
        grid = num_experts, num_outputs, num_inputs // 32
        codes = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(118, 124, grid, dtype=torch.uint8, generator=random)
        numbers = convert_moe_packed_tensors(codes, scales, dtype=weight.dtype)
        return {f"{name}_blocks": codes, f"{name}_scales": scales}, numbers

    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return store(
        base,
        directory,
        quantize,
        declared,
        takes=lambda name, _: name.endswith(("experts.gate_up_proj", "experts.down_proj")),
        apart=(lambda name: name.endswith("_scales")) if apart else None,
    )
