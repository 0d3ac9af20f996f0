"""The stream lane of a pass: one walk over a base that writes, for all jobs, what is copied and what is streamed.

Each tile of a weight is read (or dequantized) once; every adapter's delta is added to it in float32, rounded once to
the output's dtype, and written at its final offset. The order of operations is that of PEFT's `Linear.merge` with
`safe_merge=False` (0.21): (B @ A) in float32, times the scaling, plus W, one rounding.

Shape suffixes: O output features, I input features, R rank.
"""

import contextlib
import itertools
import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jobs.errors import BadInputError
from workers import kernels
from workers.files import file_errors
from workers.lanes.lora import read_operand
from workers.passes import PassJob, PassState, check_range
from workers.plan import BasePlan, OutputTensor
from workers.quant import QuantizedWeight
from workers.quantized_base import QuantizedBase
from workers.tensor_io import read_into
from workers.tiles import TILE_ELEMENTS, TileBuffers, rows_per_tile
from workers.writer import CheckpointWriter

_COPY_BYTES = 8 << 20
"""What one thread copies at a time: little enough that all have work until the end."""
_MAX_OPEN_SHARDS = 256
"""Shards of all jobs that are written at one time; each holds two descriptors, and 1024 is a common limit."""


class _Weight:
    """What the tiles of one tensor share: loaded with the first, dropped with the last."""

    def __init__(self, tensor: OutputTensor, quantized: QuantizedWeight | None, num_tiles: int) -> None:
        self.tensor = tensor
        self.quantized = quantized
        self.num_tiles_left = num_tiles
        self.lock = threading.Lock()
        self.operands: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """lora_A [R, I] and lora_B [O, R] of each job, float32, on the device."""


@dataclass(frozen=True, slots=True)
class _Tile:
    weight: _Weight
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.weight.tensor.num_columns


class Walk:
    """The tiles of one pass. Threads call `work` until nothing is left."""

    def __init__(
        self,
        base: BasePlan,
        quantized: QuantizedBase | None,
        state: PassState,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._base = base
        self._quantized = quantized
        self._state = state
        self._device = device
        self._lock = threading.Lock()
        self._tiles = self._all_tiles(num_threads)
        self._stopped = False
        self._descriptors: dict[str, int] = {}
        self._buffers = TileBuffers(device)

    def work(self) -> None:
        """Take tiles in order and finish them, until none is left or every job has failed."""
        stream = self._buffers.stream
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                while (tile := self._next_tile()) is not None:
                    if self._computed(tile.weight.tensor):
                        self._compute(tile)
                    else:
                        self._copy(tile)
        except BaseException:
            self._stopped = True
            raise

    def close(self) -> None:
        """Close the base's files; call once all threads have ended."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _next_tile(self) -> _Tile | None:
        with self._lock:
            if self._stopped or self._state.over:
                return None
            return next(self._tiles, None)

    def _all_tiles(self, num_abreast: int) -> Iterator[_Tile]:
        """Yield all tiles: of a few shards in turns, as the kernel lets one thread at a time write to a file."""
        by_shard: dict[str, list[OutputTensor]] = defaultdict(list)
        for tensor in self._base.tensors:
            by_shard[tensor.shard].append(tensor)
        waiting = iter(by_shard.values())
        num_abreast = max(1, min(num_abreast, _MAX_OPEN_SHARDS // max(1, len(self._state.jobs))))
        in_turn = deque(self._tiles_of(tensors) for tensors in itertools.islice(waiting, num_abreast))
        while in_turn:
            tiles = in_turn.popleft()
            while (tile := next(tiles, None)) is None and (tensors := next(waiting, None)) is not None:
                tiles = self._tiles_of(tensors)
            if tile is not None:
                in_turn.append(tiles)
                yield tile

    def _tiles_of(self, tensors: Sequence[OutputTensor]) -> Iterator[_Tile]:
        for tensor in tensors:
            if not self._takers(tensor):
                continue
            quantized = None
            if tensor.stored is None:
                assert self._quantized is not None
                quantized = self._quantized.weight(tensor.name)
                if quantized.shape != tensor.shape:
                    raise BadInputError(
                        f"{self._base.source.directory}: tensor {tensor.name} is stored in 4-bit as "
                        f"{list(quantized.shape)}, config.json makes it {list(tensor.shape)}; the checkpoint is corrupt"
                    )
            step = max(1, _COPY_BYTES // (tensor.num_columns * tensor.dtype.itemsize))
            if tensor.num_bytes == 0:
                step = tensor.num_rows
            if self._computed(tensor):
                alignment = quantized.row_alignment if quantized else 1
                step = rows_per_tile(tensor.num_rows, tensor.num_columns, alignment, TILE_ELEMENTS[self._device.type])
            starts = range(0, max(tensor.num_rows, 1), max(step, 1))
            weight = _Weight(tensor, quantized, len(starts))
            for start in starts:
                yield _Tile(weight, start, min(start + step, tensor.num_rows))

    def _computed(self, tensor: OutputTensor) -> bool:
        if tensor.num_bytes == 0:
            return False
        return not tensor.copied or any(tensor.name in job.plan.deltas for job in self._state.jobs.values())

    def _takers(self, tensor: OutputTensor) -> list[str]:
        return [name for name, job in self._state.jobs.items() if job.plan.streams(tensor.name)]

    def _descriptor(self, shard: str) -> int:
        with self._lock:
            if shard not in self._descriptors:
                path = self._base.source.directory / shard
                with file_errors(f"reading {path}"):
                    self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[shard]

    def _copy(self, tile: _Tile) -> None:
        tensor = tile.weight.tensor
        assert tensor.stored is not None
        source = self._descriptor(tensor.shard)
        row_bytes = tensor.stored.row_bytes
        begin = tile.start * row_bytes
        num_bytes = (tile.stop - tile.start) * row_bytes
        self._state.count(base=num_bytes)
        for name in self._takers(tensor):
            with self._state.job(name) as writer:
                if writer is not None:
                    shard, spec = writer.locate(tensor.name)
                    shard.copy(source, tensor.stored.begin + begin, spec.begin + begin, num_bytes)
                    self._state.count(written=num_bytes)

    def _compute(self, tile: _Tile) -> None:
        tensor = tile.weight.tensor
        takers = self._takers(tensor)
        with_delta = [name for name in takers if tensor.name in self._state.jobs[name].plan.deltas]
        without = [name for name in takers if name not in with_delta]
        weight_OI = self._read_tile(tile)
        rounded_OI = self._buffers.get("rounded", tensor.dtype, tile.shape, host=False)
        for name in with_delta:
            with self._state.job(name) as writer:
                if writer is not None:
                    self._add(weight_OI, tile, self._state.jobs[name], rounded_OI)
                    self._write(writer, tile, rounded_OI)
        if without:
            # Written from memory even where the base could be copied: the tile is here, and the base is read once.
            rounded_OI.copy_(weight_OI)
        for name in without:
            with self._state.job(name) as writer:
                if writer is not None:
                    check_range(tensor, rounded_OI)
                    self._write(writer, tile, rounded_OI)
        with tile.weight.lock:
            tile.weight.num_tiles_left -= 1
            if tile.weight.num_tiles_left == 0:
                tile.weight.operands.clear()

    def _read_tile(self, tile: _Tile) -> torch.Tensor:
        if tile.weight.quantized is not None:
            return tile.weight.quantized.dequantize_rows(tile.start, tile.stop)
        tensor = tile.weight.tensor
        assert tensor.stored is not None
        host_OI = self._buffers.get("stored", tensor.stored.dtype, tile.shape, host=True)
        path = self._base.source.directory / tensor.shard
        begin = tensor.stored.begin + tile.start * tensor.stored.row_bytes
        read_into(self._descriptor(tensor.shard), path, host_OI, begin)
        self._state.count(base=host_OI.numel() * host_OI.itemsize)
        return host_OI.to(self._device, non_blocking=True)

    def _operands(self, tile: _Tile, job: PassJob) -> tuple[torch.Tensor, torch.Tensor]:
        delta = job.plan.deltas[tile.weight.tensor.name]
        name = job.plan.request.id
        with tile.weight.lock:
            if name not in tile.weight.operands:
                a_RI = read_operand(job.plan.opened, delta.a_RI).to(self._device)
                b_OR = read_operand(job.plan.opened, delta.b_OR).to(self._device)
                tile.weight.operands[name] = a_RI, b_OR
                self._state.count(adapter=delta.a_RI.num_bytes + delta.b_OR.num_bytes)
            return tile.weight.operands[name]

    def _add(self, weight_OI: torch.Tensor, tile: _Tile, job: PassJob, rounded_OI: torch.Tensor) -> None:
        a_RI, b_OR = self._operands(tile, job)
        scaling = job.plan.deltas[tile.weight.tensor.name].scaling
        sum_OI = self._buffers.get("sum", torch.float32, tile.shape, host=False)
        torch.mm(b_OR[tile.start : tile.stop], a_RI, out=sum_OI)
        if self._device.type == "cpu":
            known = weight_OI if weight_OI.dtype in kernels.ARRAY_DTYPES else weight_OI.float()
            if not kernels.add_delta(
                kernels.array(known), kernels.array(sum_OI), np.float32(scaling), kernels.array(rounded_OI)
            ):
                check_range(tile.weight.tensor, sum_OI.mul_(scaling).add_(weight_OI))
            return
        if scaling != 1.0:
            sum_OI.mul_(scaling)
        sum_OI.add_(weight_OI)
        check_range(tile.weight.tensor, sum_OI)
        rounded_OI.copy_(sum_OI)

    def _write(self, writer: CheckpointWriter, tile: _Tile, rounded_OI: torch.Tensor) -> None:
        host_OI = rounded_OI
        if self._buffers.stream is not None:
            host_OI = self._buffers.get("shipped", rounded_OI.dtype, tile.shape, host=True)
            host_OI.copy_(rounded_OI, non_blocking=True)
            self._buffers.stream.synchronize()
        self._state.write(writer, tile.weight.tensor, tile.start, host_OI)
