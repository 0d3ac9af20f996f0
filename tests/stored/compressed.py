"""Bases in the formats of compressed-tensors: compressed, and taken as numbers, by that library itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from tests.stored import Quantized, is_linear, store

FP8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int"}
FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "fp8 by channel": ("float-quantized", {**FP8, "strategy": "channel"}),
    "fp8 by tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8 by block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 32]}),
    "int8 by channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 with zero points": ("naive-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int4 by group": ("pack-quantized", {**INT4, "strategy": "group", "group_size": 32}),
    "int4 by channel": ("pack-quantized", {**INT4, "strategy": "channel"}),
    "int4 with zero points": ("pack-quantized", {**INT4, "strategy": "group", "group_size": 16, "symmetric": False}),
    "int3": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "mxfp8": ("mxfp8-quantized", {**FP8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
}
"""By what people call them: the format, and its arguments for weights."""


def store_compressed(base: Path, directory: Path, of: str, *, apart: bool = False, **declared: Any) -> Path:
    """Store the linear weights of a base in a format of compressed-tensors; see `store`.

    Args:
        base: in 16 bits, in one file.
        directory: becomes the base in that format.
        of: one of `FORMATS`.
        apart: whether scales lie in a shard of their own.
        declared: further fields of the configuration.
    """
    format_, arguments = FORMATS[of]
    group_size = arguments.get("group_size", 1)
    group = {"targets": ["Linear"], "weights": dict(arguments)}
    scheme = QuantizationScheme.model_validate(group)
    configuration = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **declared,
    }
    scales_apart = (lambda name: name.endswith("_scale")) if apart else None
    return store(
        base,
        directory,
        lambda name, weight: compress(name, weight, format_, scheme),
        configuration,
        takes=lambda name, weight: is_linear(name, weight) and weight.shape[1] % group_size == 0,
        apart=scales_apart,
    )


def compress(
    name: str,
    weight: torch.Tensor,
    format_: str,
    scheme: QuantizationScheme,
    global_scale: torch.Tensor | None = None,
) -> Quantized:
    """Return the parts of a weight in a format, and the numbers they stand for; a global scale may be given."""
    compressor = BaseCompressor.get_value_from_registry(format_)
    state: dict[str, torch.Tensor] = {"weight": weight}
    whole = weight.aminmax()
    smallest, largest = extremes(weight.float(), scheme)
    if scheme.weights.strategy == "tensor_group":
        own = generate_gparam(whole.min.float(), whole.max.float())
        state["weight_global_scale"] = own if global_scale is None else global_scale
    scales, zeros = calculate_qparams(smallest, largest, scheme.weights, state.get("weight_global_scale"))
    state["weight_scale"] = scales.to(weight.dtype)
    state["weight_zero_point"] = zeros.to(torch.int8)
    stored = compressor.compress(state, scheme)
    owner = name.removesuffix("weight")
    numbers = compressor.decompress(stored, scheme)["weight"].to(weight.dtype)
    return {owner + part: tensor.contiguous() for part, tensor in stored.items()}, numbers.contiguous()


def extremes(weight: torch.Tensor, scheme: QuantizationScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest value of each part that has a scale."""
    strategy, group = scheme.weights.strategy, scheme.weights.group_size
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        rows, columns = scheme.weights.block_structure
        missing = (-weight.shape[1] % columns, -weight.shape[0] % rows)
        padded = torch.nn.functional.pad(weight, (0, missing[0], 0, missing[1]))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, group))
    return groups.amin(2), groups.amax(2)
