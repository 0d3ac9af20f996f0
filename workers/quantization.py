"""Quantizing a base: what decides the bits, and the 4-bit tensors of one weight after the other."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import torch
import transformers

from workers.checkpoint import CheckpointLayout
from workers.conversions import Conversions, Group
from workers.quant import quantize_rows, restore, row_alignment, stored_tensors
from workers.tensor_io import read_rows

_TILE_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationTask:
    """What decides the bits of a quantized base."""

    base: Path
    base_digest: str
    layout: CheckpointLayout
    weights: tuple[str, ...]
    """Names in the checkpoint of the weights to convert that are stored as they are."""
    transposed: frozenset[str]
    """Those of them that are converted as their transpose."""
    made: frozenset[str]
    """Names in the model of weights to convert that are made of several stored tensors, or of a part of one."""
    conversions: Conversions
    """How they are made."""
    quant_type: str
    double_quant: bool
    dtype: torch.dtype | None
    """Weights are cast to this first, as `from_pretrained(dtype=...)` does; None keeps their own."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups in which some weight is converted."""
        return tuple(group for group in self.conversions.groups if not self.made.isdisjoint(group.parameters))

    @property
    def converted(self) -> frozenset[str]:
        """Names of the stored tensors whose values go through 4 bits, in part at least."""
        return frozenset(self.weights).union(*(group.stored for group in self.groups))

    @property
    def num_weights(self) -> int:
        """Number of weights to convert."""
        return len(self.weights) + len(self.made)

    def key(self, device: torch.device) -> str:
        """Return the digest under which the result is kept. Devices may round differently, so each has its own."""
        decides = {
            "base": self.base_digest,
            "weights": self.weights,
            "transposed": sorted(self.transposed),
            "made": {name: self.conversions.group_of[name].stored for name in self.made},
            "transformers": transformers.__version__ if self.made else None,
            "quant_type": self.quant_type,
            "double_quant": self.double_quant,
            "dtype": str(self.dtype),
            "device": device.type,
            "bitsandbytes": bitsandbytes.__version__,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def quantized_weights(
    task: QuantizationTask, device: torch.device, pool: ThreadPoolExecutor, on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, dict[str, torch.Tensor], float]]:
    """Quantize the weights of a task.

    Args:
        task: what to quantize.
        device: where.
        pool: tiles of a weight are quantized by all its threads.
        on_bytes: told the bytes of the base read, as they are; may raise to stop.

    Yields:
        Of each weight its name, the tensors it is stored as, by suffix, and the Frobenius norm of what 4 bits changed.
    """

    def read(name: str) -> torch.Tensor:
        shard, spec = task.layout.tensors[name]
        tensor = read_rows(task.base / shard.name, spec, 0, spec.shape[0] if spec.shape else 1)
        on_bytes(tensor.numel() * tensor.itemsize)
        return tensor.to(task.dtype or spec.dtype)

    for name in task.weights:
        if name in task.transposed:
            # As transformers does, over the whole transpose: its blocks take a value from every row of the file.
            yield name, *_quantize_whole(task, read(name).T, device)
        else:
            yield name, *_quantize_rows(task, name, device, pool, on_bytes)
    for group in task.groups:
        for name, tensor in task.conversions.load(group, read).items():
            if name in task.made:
                yield name, *_quantize_whole(task, tensor, device)


def _quantize_whole(
    task: QuantizationTask, weight: torch.Tensor, device: torch.device
) -> tuple[dict[str, torch.Tensor], float]:
    weight = weight.to(device).contiguous()
    codes, absmax = quantize_rows(weight, task.quant_type)
    num_rows, num_columns = weight.shape
    tensors = stored_tensors(
        codes,
        absmax,
        quant_type=task.quant_type,
        double_quant=task.double_quant,
        shape=(num_rows, num_columns),
        dtype=weight.dtype,
    )
    return tensors, math.sqrt(_square_error(restore("", tensors).dequantize_rows(0, num_rows), weight))


def _square_error(dequantized: torch.Tensor, weight: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(dequantized.float() - weight.float())) ** 2


def _quantize_rows(
    task: QuantizationTask,
    name: str,
    device: torch.device,
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], None],
) -> tuple[dict[str, torch.Tensor], float]:
    shard, spec = task.layout.tensors[name]
    num_rows, num_columns = spec.shape
    alignment = row_alignment(num_columns)
    rows_per_tile = max(1, _TILE_ELEMENTS // (num_columns * alignment)) * alignment
    dtype = task.dtype or spec.dtype

    def read(start: int) -> torch.Tensor:
        tile = read_rows(task.base / shard.name, spec, start, min(start + rows_per_tile, num_rows))
        return tile.to(device=device, dtype=dtype)

    def quantize_tile(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        tile = read(start)
        on_bytes(tile.numel() * spec.dtype.itemsize)
        return quantize_rows(tile, task.quant_type)

    starts = range(0, num_rows, rows_per_tile)
    tiles = list(pool.map(quantize_tile, starts))
    tensors = stored_tensors(
        torch.cat([codes for codes, _ in tiles]),
        torch.cat([absmax for _, absmax in tiles]),
        quant_type=task.quant_type,
        double_quant=task.double_quant,
        shape=(num_rows, num_columns),
        dtype=dtype,
    )
    weight = restore(name, tensors)

    def error_of_tile(start: int) -> float:
        # Scales that are quantized themselves are final with the last tile only: the first look is for the page cache.
        return _square_error(weight.dequantize_rows(start, min(start + rows_per_tile, num_rows)), read(start))

    return tensors, math.sqrt(sum(pool.map(error_of_tile, starts)))
