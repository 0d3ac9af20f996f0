"""Quantizing a base: what decides the bits, and the 4-bit tensors of one weight after the other."""

import dataclasses
import functools
import hashlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from workers import kernels
from workers.checkpoint import CheckpointLayout
from workers.conversions import Conversions, Group
from workers.quant import BITSANDBYTES_VERSION, quantize_rows, restore, row_alignment, stored_tensors
from workers.tensor_io import opened, read_into, read_rows
from workers.tiles import single_threads

_TILE_ELEMENTS = 1 << 19


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

    @property
    def by_shard(self) -> Mapping[str, "QuantizationTask"]:
        """The same work, by shards of the base; what is made of several is with the shard of the first of them."""
        weights: dict[str, list[str]] = defaultdict(list)
        made: dict[str, set[str]] = defaultdict(set)
        for name in self.weights:
            weights[self._shard(name)].append(name)
        for group in self.groups:
            made[self._shard(group.stored[0])] |= self.made.intersection(group.parameters)
        return {
            shard.name: dataclasses.replace(
                self,
                weights=tuple(weights[shard.name]),
                transposed=self.transposed.intersection(weights[shard.name]),
                made=frozenset(made[shard.name]),
            )
            for shard in self.layout.shards
            if shard.name in weights or shard.name in made
        }

    def _shard(self, name: str) -> str:
        return self.layout.tensors[name][0].name

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
            "bitsandbytes": BITSANDBYTES_VERSION,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


Quantized = tuple[str, dict[str, torch.Tensor], dict[str, float]]
"""Of a weight its name, the tensors it is stored as, by suffix, and what is known then of what 4 bits changed: the
Frobenius norm of the difference, by names in the checkpoint."""


def quantized_weights(
    task: QuantizationTask, device: torch.device, num_threads: int, on_bytes: Callable[[int], None]
) -> Iterator[Quantized]:
    """Quantize the weights of a task.

    Args:
        task: what to quantize.
        device: where.
        num_threads: weights that are quantized at the same time.
        on_bytes: told the bytes of the base read, as they are; may raise to stop.

    Yields:
        One weight after the other, a few of them ahead of whoever takes them.
    """
    upright = [name for name in task.weights if name not in task.transposed]
    quantize = functools.partial(_quantize_rows, task, device, on_bytes)
    with single_threads(num_threads, "quantize") as pool:
        ahead: deque[Future[Quantized]] = deque()
        for name in upright:
            if len(ahead) > num_threads:
                yield ahead.popleft().result()
            ahead.append(pool.submit(quantize, name))
        while ahead:
            yield ahead.popleft().result()

    def read(name: str) -> torch.Tensor:
        shard, spec = task.layout.tensors[name]
        tensor = read_rows(task.base / shard.name, spec, 0, spec.shape[0] if spec.shape else 1)
        on_bytes(tensor.numel() * tensor.itemsize)
        return tensor.to(task.dtype or spec.dtype)

    for name in task.weights:
        if name in task.transposed:
            # As transformers does, over the whole transpose: its blocks take a value from every row of the file.
            weight = read(name).T.contiguous()
            tensors = _quantize_whole(task, weight, device)
            errors = [_square_error(tile, weight[start:stop]) for start, stop, tile in _dequantized(tensors, device)]
            yield name, tensors, {name: math.sqrt(sum(errors))}
    for group in task.groups:
        stored = {name: read(name) for name in group.stored}
        made = task.conversions.load(group, stored.__getitem__)
        in_4bit = {name: _quantize_whole(task, tensor, device) for name, tensor in made.items() if name in task.made}
        through_4bit = made | {
            name: torch.cat([tile.cpu() for _, _, tile in _dequantized(tensors, device)])
            for name, tensors in in_4bit.items()
        }
        back = task.conversions.revert(group, through_4bit)
        group_errors = {name: math.sqrt(_square_error(back[name], tensor)) for name, tensor in stored.items()}
        for name, tensors in in_4bit.items():
            yield name, tensors, group_errors


def _quantize_whole(task: QuantizationTask, weight: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    codes, absmax = quantize_rows(weight.to(device).contiguous(), task.quant_type)
    return _stored(task, codes, absmax, weight.shape, weight.dtype)


def _stored(
    task: QuantizationTask, codes: torch.Tensor, absmax: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    num_rows, num_columns = shape
    return stored_tensors(
        codes,
        absmax,
        quant_type=task.quant_type,
        double_quant=task.double_quant,
        shape=(num_rows, num_columns),
        dtype=dtype,
    )


def _dequantized(tensors: dict[str, torch.Tensor], device: torch.device) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield tiles of the weight that 4-bit tensors stand for, with their first row and the row behind their last."""
    weight = restore("", tensors).to(device)
    num_rows, num_columns = weight.shape
    step = max(1, _TILE_ELEMENTS // (num_columns * weight.row_alignment)) * weight.row_alignment
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield start, stop, weight.dequantize_rows(start, stop)


def _square_error(through_4bit: torch.Tensor, weight: torch.Tensor) -> float:
    if through_4bit.device.type == "cpu" and {through_4bit.dtype, weight.dtype} <= kernels.ARRAY_DTYPES.keys():
        left, right = (kernels.array(tensor.contiguous()) for tensor in (through_4bit, weight))
        return float(kernels.square_difference(left, right))
    return float(torch.linalg.vector_norm(through_4bit.float() - weight.to(through_4bit.device).float())) ** 2


def _quantize_rows(
    task: QuantizationTask, device: torch.device, on_bytes: Callable[[int], None], name: str
) -> Quantized:
    shard, spec = task.layout.tensors[name]
    path = task.base / shard.name
    num_rows, num_columns = spec.shape
    alignment = row_alignment(num_columns)
    rows_per_tile = max(1, _TILE_ELEMENTS // (num_columns * alignment)) * alignment
    dtype = task.dtype or spec.dtype
    with opened(path) as descriptor:

        def tiles() -> Iterator[tuple[int, int, torch.Tensor]]:
            for start in range(0, num_rows, rows_per_tile):
                stop = min(start + rows_per_tile, num_rows)
                tile = torch.empty(stop - start, num_columns, dtype=spec.dtype)
                read_into(descriptor, path, tile, spec.begin + start * spec.row_bytes)
                yield start, stop, tile.to(device=device, dtype=dtype)

        parts = []
        for _, _, tile in tiles():
            on_bytes(tile.numel() * spec.dtype.itemsize)
            parts.append(quantize_rows(tile, task.quant_type))
        codes, absmax = (torch.cat(each) for each in zip(*parts, strict=True))
        tensors = _stored(task, codes, absmax, spec.shape, dtype)
        weight = restore(name, tensors).to(device)
        # Scales that are quantized themselves are final with the last tile only: the first look is for the page cache.
        errors = [_square_error(weight.dequantize_rows(start, stop), tile) for start, stop, tile in tiles()]
    return name, tensors, {name: math.sqrt(sum(errors))}
