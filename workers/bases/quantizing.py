"""Quantizing a base by bitsandbytes, a strip of a weight after the other, on several threads."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from workers.bases.four_bit import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    QuantizedWeight,
    quantize_rows,
    restore,
    row_alignment,
    stored_tensors,
)
from workers.bases.quantization_task import QuantizationTask
from workers.files.layout import CheckpointLayout, lay_out_shard
from workers.files.tensor_io import opened, read_into, read_rows
from workers.numerics.kernels import merging
from workers.numerics.kernels.elements import ARRAY_DTYPES, array
from workers.numerics.tiles import TileBuffers, single_threads

_TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 24}


Quantized = tuple[str, dict[str, torch.Tensor], dict[str, float]]
"""Of a weight its name, tensors it is stored as, by suffix, and what is known then of what 4 bits changed: by names in
the checkpoint, the Frobenius norm of the difference."""


def streamed_layout(task: QuantizationTask) -> CheckpointLayout:
    """Return where `quantize_streamed` writes what grows with the weights: codes and scales, both in order.

    They are in two files, so that each file can be hashed as it grows.
    """
    codes: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    scales: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name in _upright(task):
        num_elements = task.layout.tensors[name][1].num_elements
        num_blocks = math.ceil(num_elements / BLOCK_SIZE)
        codes.append((name, torch.uint8, (math.ceil(num_elements / 2), 1)))
        if task.double_quant:
            scales.append((f"{name}.absmax", torch.uint8, (num_blocks,)))
            scales.append((f"{name}.nested_absmax", torch.float32, (math.ceil(num_blocks / NESTED_BLOCK_SIZE),)))
        else:
            scales.append((f"{name}.absmax", torch.float32, (num_blocks,)))
    files = {"codes.safetensors": codes, "scales.safetensors": scales}
    return CheckpointLayout(tuple(lay_out_shard(file, tensors) for file, tensors in files.items() if tensors))


def quantize_streamed(
    task: QuantizationTask,
    device: torch.device,
    num_threads: int,
    *,
    write: Callable[[str, int, torch.Tensor], None],
    on_bytes: Callable[[int], None],
) -> Iterator[Quantized]:
    """Quantize the weights that can be taken in tiles: those that are stored as they are converted.

    Memory: tiles; where scales are quantized themselves, the scales and codes of the weights in work.

    Args:
        task: what to quantize.
        device: where.
        num_threads: tiles that are quantized at the same time.
        write: told of each tensor of `streamed_layout` its bytes: its name, where they begin in it, and a contiguous
            tensor of them on the CPU; each byte once, in any order.
        on_bytes: told the bytes of the base read, as they are; may raise to stop.

    Yields:
        Each weight with the small tensors that belong to it, too.
    """
    buffers = TileBuffers(device)
    weights = [_Streamed(task, name, device, buffers, write) for name in _upright(task)]
    tiles = ((weight, start) for weight in weights for start in weight.starts)

    def quantize(tile: tuple[_Streamed, int]) -> Quantized | None:
        weight, start = tile
        return weight.quantize(start, on_bytes)

    with single_threads(num_threads, "quantize") as pool:
        yield from filter(None, pool.map(quantize, tiles))


class _Streamed:
    """A weight that is quantized tile by tile; several threads do so."""

    def __init__(
        self,
        task: QuantizationTask,
        name: str,
        device: torch.device,
        buffers: TileBuffers,
        write: Callable[[str, int, torch.Tensor], None],
    ) -> None:
        self._task = task
        self._name = name
        self._device = device
        self._buffers = buffers
        self._write = write
        shard, self._spec = task.layout.tensors[name]
        self._path = task.base / shard.name
        self._num_rows, self._num_columns = self._spec.shape
        alignment = row_alignment(self._num_columns)
        self._step = max(1, _TILE_ELEMENTS[device.type] // (self._num_columns * alignment)) * alignment
        self.starts = range(0, self._num_rows, self._step)
        self._lock = threading.Lock()
        self._num_left = len(self.starts)
        self._square_errors: dict[int, float] = {}
        """By the row they begin at: added up in their order, not in that of the threads."""
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Codes and scales by the row they begin at, where scales are quantized themselves."""

    def quantize(self, start: int, on_bytes: Callable[[int], None]) -> Quantized | None:
        """Quantize the tile that begins at a row; return what is known of the weight with its last one."""
        tile = self._read(start)
        on_bytes(tile.numel() * self._spec.dtype.itemsize)
        codes, absmax = quantize_rows(tile, self._task.quant_type)
        if not self._task.double_quant:
            self._put(start, codes, absmax)
            weight = QuantizedWeight(
                codes=codes,
                absmax=absmax,
                blocksize=BLOCK_SIZE,
                quant_type=self._task.quant_type,
                shape=(tile.shape[0], tile.shape[1]),
                dtype=tile.dtype,
            )
            self._square_errors[start] = self._error(weight, 0, tile)
        with self._lock:
            if self._task.double_quant:
                self._parts[start] = codes, absmax
            self._num_left -= 1
            if self._num_left:
                return None
        return self._finish(codes[:1], absmax[:1])

    def _finish(self, some_codes: torch.Tensor, some_absmax: torch.Tensor) -> Quantized:
        if not self._task.double_quant:
            # What else is stored of it does not depend on its values.
            tensors = _stored(self._task, some_codes, some_absmax, self._spec.shape, self._dtype)
            kept = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in ("", ".absmax")}
            return self._name, kept, {self._name: self._norm}
        codes, absmax = (torch.cat([self._parts[start][part] for start in self.starts]) for part in (0, 1))
        self._parts.clear()
        tensors = _stored(self._task, codes, absmax, self._spec.shape, self._dtype)
        del codes, absmax
        weight = restore(self._name, tensors).to(self._device)
        # Scales that are quantized themselves are final with the last tile only: the first look was for the page cache.
        for start in self.starts:
            tile = self._read(start)
            self._square_errors[start] = self._error(weight, start, tile)
        for suffix in ("", ".absmax", ".nested_absmax"):
            self._write(f"{self._name}{suffix}", 0, tensors.pop(suffix))
        return self._name, tensors, {self._name: self._norm}

    @property
    def _norm(self) -> float:
        return math.sqrt(sum(self._square_errors[start] for start in self.starts))

    @property
    def _dtype(self) -> torch.dtype:
        return self._task.dtype or self._spec.dtype

    def _read(self, start: int) -> torch.Tensor:
        stop = min(start + self._step, self._num_rows)
        tile = self._buffers.get("stored", self._spec.dtype, (stop - start, self._num_columns), host=True)
        with opened(self._path) as descriptor:
            read_into(descriptor, self._path, tile, self._spec.begin + start * self._spec.row_bytes)
        return tile.to(device=self._device, dtype=self._dtype)

    def _error(self, weight: QuantizedWeight, start: int, tile: torch.Tensor) -> float:
        num_rows, num_columns = tile.shape
        memory = None
        if self._device.type == "cpu":
            memory = self._buffers.get("dequantized", tile.dtype, (num_rows, num_columns), host=True)
        return _square_error(weight.dequantize_rows(start, start + num_rows, memory), tile)

    def _put(self, start: int, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        begin = start * self._num_columns  # of a block, and of a byte
        self._write(self._name, begin // 2, self._on_host("codes", codes))
        self._write(f"{self._name}.absmax", begin // BLOCK_SIZE * absmax.itemsize, self._on_host("absmax", absmax))

    def _on_host(self, use: str, values: torch.Tensor) -> torch.Tensor:
        if values.device.type == "cpu":
            return values
        return self._buffers.get(use, values.dtype, (1, values.numel()), host=True).copy_(values.view(1, -1))


def _upright(task: QuantizationTask) -> list[str]:
    return [name for name in task.weights if name not in task.transposed]


def quantize_whole(
    task: QuantizationTask, device: torch.device, on_bytes: Callable[[int], None]
) -> Iterator[Quantized]:
    """Quantize the weights that are not stored as they are converted: one after the other, each as a whole.

    Args:
        task: what to quantize.
        device: where.
        on_bytes: told the bytes of the base read, as they are; may raise to stop.

    Yields:
        Each weight with all of its tensors.
    """

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
    step = max(1, _TILE_ELEMENTS[device.type] // (num_columns * weight.row_alignment)) * weight.row_alignment
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield start, stop, weight.dequantize_rows(start, stop)


def _square_error(through_4bit: torch.Tensor, weight: torch.Tensor) -> float:
    if through_4bit.device.type == "cpu" and {through_4bit.dtype, weight.dtype} <= ARRAY_DTYPES.keys():
        left, right = (array(tensor.contiguous()) for tensor in (through_4bit, weight))
        return float(merging.square_difference(left, right))
    difference = through_4bit.float().sub_(weight.to(through_4bit.device))
    return float(torch.linalg.vector_norm(difference)) ** 2
