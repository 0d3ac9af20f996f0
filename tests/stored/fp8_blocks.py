"""Bases in FP8 with a scale for each block, as DeepSeek and Qwen publish theirs."""

import math
from pathlib import Path

import torch

from tests.stored import Quantized, is_linear, store

FP8 = torch.float8_e4m3fn


def store_fp8(
    base: Path,
    directory: Path,
    *,
    block: tuple[int, int] | None = (128, 128),
    scale_dtype: torch.dtype = torch.bfloat16,
    apart: bool = False,
    called: str = "_scale_inv",
    method: str = "fp8",
) -> Path:
    """Store the linear weights of a base in FP8; see `store`.

    Args:
        base: in 16 bits, in one file.
        directory: becomes the base in FP8.
        block: rows and columns that share a scale; None for one scale for a weight.
        scale_dtype: of the scales.
        apart: whether scales lie in a shard of their own.
        called: what follows a weight's name in that of its scales; where that is `_scale`, a block is a row, or all.
        method: what is declared.
    """

    def quantize(name: str, weight: torch.Tensor) -> Quantized:
        own = tuple(weight.shape) if block is None else (block[0], weight.shape[1] if called == "_scale" else block[1])
        codes, scales = quantize_fp8(weight, own, scale_dtype)
        stored = {name: codes, f"{name}{called}": scales if block else scales.reshape(())}
        return stored, dequantize_fp8(codes, scales, own, weight.dtype)

    declared = {"quant_method": method, "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    scales_apart = (lambda name: name.endswith(called)) if apart else None
    return store(base, directory, quantize, declared, takes=is_linear, apart=scales_apart)


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
