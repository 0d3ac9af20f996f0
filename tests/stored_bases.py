"""Bases stored in other forms, in the layouts they are published in; and what their weights are as numbers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn


def store_fp8(
    base: Path,
    directory: Path,
    *,
    block: tuple[int, int] | None = (128, 128),
    scale_dtype: torch.dtype = torch.bfloat16,
    apart: bool = False,
    takes: Callable[[str], bool] = lambda name: "proj" in name,
) -> Path:
    """Store the linear weights of a base in FP8, as DeepSeek and Qwen publish theirs.

    Args:
        base: in 16 bits, in one file.
        directory: becomes the base in FP8; beside it, as `<directory>-twin`, its weights as numbers in 16 bits.
        block: rows and columns that share a scale; None for one scale for a weight.
        scale_dtype: of the scales.
        apart: whether scales lie in a shard of their own.
        takes: says of a weight's name whether it is stored in FP8.
    """
    twin = directory.with_name(f"{directory.name}-twin")
    for copy in (directory, twin):
        shutil.copytree(base, copy)
    tensors = load_file(base / "model.safetensors")
    stored, scales, numbers = {}, {}, {}
    for name, weight in tensors.items():
        if weight.dim() != 2 or not name.endswith(".weight") or not takes(name):
            stored[name] = numbers[name] = weight
            continue
        codes, scale = quantize_fp8(weight, block or tuple(weight.shape), scale_dtype)
        stored[name], numbers[name] = codes, dequantize_fp8(codes, scale, block or tuple(weight.shape), weight.dtype)
        scales[f"{name}_scale_inv"] = scale if block else scale.reshape(())
    save_file(numbers, twin / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    declared = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    if not apart:
        save_file(stored | scales, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    (directory / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": stored, "model-00002-of-00002.safetensors": scales}
    for file, held in files.items():
        save_file(held, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def quantize_fp8(
    weight: torch.Tensor, block: tuple[int, ...], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [O, I] and a scale for each block: the largest magnitude in it becomes the largest code."""
    grid = tuple(math.ceil(size / step) for size, step in zip(weight.shape, block, strict=True))
    scales = torch.empty(grid)
    codes = torch.empty(weight.shape, dtype=FP8)
    for row in range(grid[0]):
        for column in range(grid[1]):
            at = _at(row, column, block)
            part = weight[at].float()
            scales[row, column] = (part.abs().max() / torch.finfo(FP8).max).to(scale_dtype).float()
            codes[at] = (part / scales[row, column]).clamp(-448, 448).to(FP8)
    return codes, scales.to(scale_dtype)


def dequantize_fp8(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return what codes and scales stand for, block by block: their product in float32, rounded once."""
    weight = torch.empty(codes.shape, dtype=dtype)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            at = _at(row, column, block)
            weight[at] = (codes[at].float() * scales[row, column].float()).to(dtype)
    return weight


def _at(row: int, column: int, block: tuple[int, ...]) -> tuple[slice, slice]:
    return (
        slice(row * block[0], (row + 1) * block[0]),
        slice(column * block[1], (column + 1) * block[1]),
    )
