"""The stream lane of a pass: one walk over a base that makes, for all jobs, what is copied and what is streamed.

Each tile of a weight is read (or dequantized) once; every adapter's delta is added to it in float32, rounded once to
the output's dtype, handed over to be written at its final offset, and checked in the very memory it is written and
hashed from. The order of operations is that of PEFT's `Linear.merge` with `safe_merge=False` (0.21): (B @ A) in
float32, times the scaling, plus W, one rounding.

Shape suffixes: O output features, I input features, R rank.
"""

import contextlib
import functools
import itertools
import math
import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import torch

from jobs.errors import BadInputError
from workers.adapters.lora import read_operand
from workers.bases.quantized_base import QuantizedBase
from workers.files.foreign import open_foreign
from workers.files.tensor_io import read_into
from workers.merging.arithmetic import ArithmeticCheck
from workers.merging.base_plan import BasePlan
from workers.merging.output import OutputTensor
from workers.merging.passes import PassJob, PassState, check_range
from workers.merging.tally import Tally
from workers.merging.work import Tile, WeightInWork
from workers.numerics import products
from workers.numerics.products import Comparison
from workers.numerics.tiles import TILE_ELEMENTS, TileBuffers, Tiling, pieces_of

_MAX_OPEN_SHARDS = 256
"""Shards of all jobs that are written at one time; each holds two descriptors, and 1024 is a common limit."""


class Walk:
    """The tiles of one pass. Threads call `work` until nothing is left."""

    def __init__(
        self,
        base: BasePlan,
        quantized: QuantizedBase | None,
        state: PassState,
        *,
        check: ArithmeticCheck | None,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._base = base
        self._quantized = quantized
        self._state = state
        self._check = check
        self._device = device
        self._lock = threading.Lock()
        self._tiles = self._all_tiles(num_threads)
        self._stopped = False
        self._descriptors: dict[str, int] = {}
        self._buffers = TileBuffers(device)
        self._streams = iter(_streams(device, num_threads) if device.type == "cuda" else ())

    def work(self) -> None:
        """Take tiles in order and finish them, until none is left or every job has failed."""
        stream = next(self._streams, None)
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                while (tile := self._next_tile()) is not None:
                    self._finish(tile)
        except BaseException:
            self._stopped = True
            raise

    def close(self) -> None:
        """Close the base's files; call once all threads have ended."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _next_tile(self) -> Tile | None:
        with self._lock:
            if self._stopped or self._state.over:
                return None
            return next(self._tiles, None)

    def _all_tiles(self, num_abreast: int) -> Iterator[Tile]:
        """Yield all tiles: of a few shards in turns, as the kernel lets one thread at a time write to a file."""
        by_shard: dict[str, list[OutputTensor]] = defaultdict(list)
        for tensor in self._base.tensors:
            if self._takers(tensor):
                by_shard[tensor.shard].append(tensor)
        # So many that no last one is left over: the digest of a file takes its bytes one after the other.
        num_abreast = math.ceil(len(by_shard) / max(1, len(by_shard) // num_abreast))
        num_abreast = max(1, min(num_abreast, _MAX_OPEN_SHARDS // max(1, len(self._state.jobs))))
        waiting = iter(by_shard.values())
        in_turn = deque(self._tiles_of(tensors) for tensors in itertools.islice(waiting, num_abreast))
        while in_turn:
            tiles = in_turn.popleft()
            while (tile := next(tiles, None)) is None and (tensors := next(waiting, None)) is not None:
                tiles = self._tiles_of(tensors)
            if tile is not None:
                in_turn.append(tiles)
                yield tile

    def _tiles_of(self, tensors: Sequence[OutputTensor]) -> Iterator[Tile]:
        for tensor in tensors:
            quantized = None
            if tensor.stored is None:
                assert self._quantized is not None
                quantized = self._quantized.weight(tensor.name)
                if quantized.shape != tensor.shape:
                    raise BadInputError(
                        f"{self._base.source.directory}: tensor {tensor.name} is stored in 4-bit as "
                        f"{list(quantized.shape)}, config.json makes it {list(tensor.shape)}; the checkpoint is corrupt"
                    )
            alignment = quantized.row_alignment if quantized else 1
            tiling = Tiling.of(tensor.shape, alignment, TILE_ELEMENTS[self._device.type])
            weight = WeightInWork(tensor, quantized, tiling.num_columns, len(tiling.rows))
            for rows in tiling.rows:
                yield Tile(weight, rows)

    def _computed(self, tensor: OutputTensor) -> bool:
        if tensor.num_bytes == 0:
            return False
        return not tensor.copied or any(tensor.name in job.plan.deltas for job in self._state.jobs.values())

    def _takers(self, tensor: OutputTensor) -> list[str]:
        return [name for name, job in self._state.jobs.items() if job.plan.streams(tensor.name)]

    def _descriptor(self, shard: str) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = open_foreign(self._base.source.directory / shard, any_size=True).descriptor
            return self._descriptors[shard]

    def _finish(self, tile: Tile) -> None:
        """Make a tile for all jobs that take it, have it written, and check it."""
        weight, tensor = tile.weight, tile.weight.tensor
        takers = self._state.well(self._takers(tensor))
        if not takers:
            return
        made_from = None if self._in_place(tile, len(takers)) else self._read(tile)
        # Once more from where it comes from: what the merge has read may be changed by the merge.
        known = None
        if self._check is not None and tile.num_bytes:
            source = self._descriptor(tensor.shard) if tensor.stored is not None else None
            known = self._check.weight(tensor, tile.rows, source)
        for name in takers:
            self._finish_for(name, tile, made_from, known)
        with weight.lock:
            weight.num_tiles_left -= 1
            if weight.num_tiles_left == 0:
                weight.operands.clear()
                for name, tally in weight.tallies.items():
                    self._state.checked(name, tally.summary())
                weight.tallies.clear()

    def _finish_for(self, name: str, tile: Tile, made_from: torch.Tensor | None, known: torch.Tensor | None) -> None:
        job, tensor = self._state.jobs[name], tile.weight.tensor
        with self._state.job(name) as writer:
            if writer is None:
                return
            shard, spec = writer.locate(tensor.name)
            tally = self._tally(tile.weight, job)
        if writer.over or tile.num_bytes == 0:
            return
        offset = spec.begin + tile.rows.start * tile.weight.num_columns * tensor.dtype.itemsize
        with shard.buffer(offset, tile.num_bytes) as buffer:
            target_OI = buffer.view(tensor.dtype, tile.shape)
            if made_from is None:
                self._read_into(tile, target_OI)  # what goes wrong here is not this job's failure alone
            with self._state.job(name) as writer:
                if writer is None:
                    return
                comparison = None
                if self._check is not None and tally is not None and known is not None and self._device.type == "cpu":
                    comparison = self._check.on_the_way(tally, known)
                self._fill(target_OI, tile, job, made_from, comparison)
                if shard.cloned and tensor.name in job.plan.kept:
                    shard.keep(offset, buffer)
                    self._state.count(kept=tile.num_bytes)
                else:
                    shard.write(offset, buffer)
                    self._state.count(written=tile.num_bytes)
                if self._check is not None and tally is not None and known is not None:
                    self._check.compare(tally, tile.rows, (shard.name, offset), buffer.values, known, found=comparison)
                    self._state.count(checked=tile.num_bytes)

    def _in_place(self, tile: Tile, num_takers: int) -> bool:
        """Whether a tile of W goes straight into the buffer it is written from, and becomes there what it is to be."""
        if num_takers > 1:
            return False
        if not self._computed(tile.weight.tensor):
            return True
        return self._device.type == "cpu" and tile.weight.dtype == tile.weight.tensor.dtype

    def _read(self, tile: Tile) -> torch.Tensor:
        """Return a tile of W, on the device if something is made from it."""
        quantized = tile.weight.quantized
        if quantized is not None and self._device.type != "cpu":
            return quantized.dequantize_rows(tile.rows.start, tile.rows.stop)
        weight_OI = self._buffers.get("weight", tile.weight.dtype, tile.shape, host=True)
        self._read_into(tile, weight_OI)
        return weight_OI.to(self._device, non_blocking=True) if self._computed(tile.weight.tensor) else weight_OI

    def _read_into(self, tile: Tile, target_OI: torch.Tensor) -> None:
        """Read a tile of W into main memory, or dequantize it there."""
        tensor, quantized = tile.weight.tensor, tile.weight.quantized
        if quantized is not None:
            weight_OI = quantized.dequantize_rows(tile.rows.start, tile.rows.stop, target_OI)
            if weight_OI.data_ptr() != target_OI.data_ptr():
                target_OI.copy_(weight_OI)
            return
        assert tensor.stored is not None
        path = self._base.source.directory / tensor.shard
        begin = tensor.stored.begin + tile.rows.start * tile.weight.num_columns * tensor.stored.dtype.itemsize
        read_into(self._descriptor(tensor.shard), path, target_OI, begin)
        self._state.count(base=tile.num_elements * tensor.stored.dtype.itemsize)

    def _fill(
        self,
        target_OI: torch.Tensor,
        tile: Tile,
        job: PassJob,
        made_from: torch.Tensor | None,
        comparison: Comparison | None,
    ) -> None:
        """Make a tile for a job: from a tile of W, or from what is in its place already."""
        tensor = tile.weight.tensor
        if tensor.name in job.plan.deltas:
            self._add(made_from, tile, job, target_OI, comparison)
            return
        if made_from is not None:
            # Written from memory even where the base could be copied: the tile is here, and the base is read once.
            target_OI.copy_(made_from)
        if self._computed(tensor):
            check_range(tensor, target_OI)

    def _operands(self, tile: Tile, job: PassJob) -> tuple[torch.Tensor, torch.Tensor]:
        delta = job.plan.deltas[tile.weight.tensor.name]
        name = job.plan.request.id
        with tile.weight.lock:
            if name not in tile.weight.operands:
                a_RI = read_operand(job.plan.opened, delta.a_RI).to(self._device)
                b_OR = read_operand(job.plan.opened, delta.b_OR).to(self._device)
                tile.weight.operands[name] = a_RI, b_OR
                self._state.count(adapter=delta.a_RI.num_bytes + delta.b_OR.num_bytes)
            return tile.weight.operands[name]

    def _tally(self, weight: WeightInWork, job: PassJob) -> Tally | None:
        if self._check is None:
            return None
        name = job.plan.request.id
        with weight.lock:
            if name not in weight.tallies:
                weight.tallies[name] = self._check.tally(job.plan, weight.tensor.name)
            return weight.tallies[name]

    def _add(
        self,
        weight_OI: torch.Tensor | None,
        tile: Tile,
        job: PassJob,
        target_OI: torch.Tensor,
        comparison: Comparison | None,
    ) -> None:
        """Add the delta, to what is in its place if W is not given; on the CPU, do a comparison on the way."""
        tensor, scaling = tile.weight.tensor, job.plan.deltas[tile.weight.tensor.name].scaling
        a_RI, b_OR = self._operands(tile, job)
        b_OR = b_OR[tile.rows]
        if self._device.type == "cpu":
            made_from = target_OI if weight_OI is None else weight_OI
            if not products.merge(
                b_OR, a_RI, scaling, target_OI, self._buffers, weight_OI=made_from, comparison=comparison
            ):
                if weight_OI is None:
                    weight_OI = self._read(tile)
                for rows in pieces_of(*tile.shape):
                    check_range(tensor, torch.mm(b_OR[rows], a_RI).mul_(scaling).add_(weight_OI[rows]))
            return
        assert weight_OI is not None
        sum_OI = self._buffers.get("sum", torch.float32, tile.shape, host=False)
        torch.mm(b_OR, a_RI, out=sum_OI)
        if scaling != 1.0:
            sum_OI.mul_(scaling)
        sum_OI.add_(weight_OI)
        rounded_OI = self._buffers.get("rounded", target_OI.dtype, tile.shape, host=False)
        rounded_OI.copy_(sum_OI)
        target_OI.copy_(rounded_OI, non_blocking=True)
        check_range(tensor, sum_OI)
        torch.cuda.current_stream(self._device).synchronize()


@functools.cache
def _streams(device: torch.device, num_threads: int) -> tuple[torch.cuda.Stream, ...]:
    """Return a stream for each thread. They stay, as memory that torch keeps is given out on its own stream alone."""
    return tuple(torch.cuda.Stream(device) for _ in range(num_threads))
