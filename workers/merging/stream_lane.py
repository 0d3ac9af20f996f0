"""The stream lane of a pass: one walk over a base that makes, for all jobs, what is copied and what is streamed.

Each tile of a weight is read (or dequantized) once; every adapter's delta is added to it in float32, rounded once to
the output's dtype, handed over to be written at its final offset, and checked in the very memory it is written and
hashed from. The order of operations is that of PEFT's `Linear.merge` with `safe_merge=False` (0.21): (B @ A) in
float32, times the scaling, plus W, one rounding.

Shape suffixes: O output features, I input features, R rank.
"""

import contextlib
import functools
import os
import threading
from pathlib import Path

import torch

from jobs.errors import BadInputError
from workers.adapters.plain_lora import read_operand
from workers.bases.quantized_base import QuantizedBase
from workers.files.foreign import open_foreign
from workers.files.tensor_io import read_into
from workers.merging.base_plan import BasePlan
from workers.merging.checks.arithmetic import ArithmeticCheck, Expected
from workers.merging.checks.tally import Tally
from workers.merging.context import Context
from workers.merging.job import Job
from workers.merging.output import OutputTensor
from workers.merging.passes import PassState, check_range
from workers.merging.work import Tile, WeightInWork, tiles_of_shards
from workers.numerics import products
from workers.numerics.device import streams_of
from workers.numerics.products import Comparison
from workers.numerics.tiles import TILE_ELEMENTS, TileBuffers, Tiling, strips_of


class Walk:
    """The tiles of one pass. Threads call `work` until nothing is left."""

    def __init__(
        self,
        base: BasePlan,
        quantized: QuantizedBase | None,
        state: PassState,
        check: ArithmeticCheck | None,
        context: Context,
    ) -> None:
        self._base = base
        self._quantized = quantized
        self._state = state
        self._check = check
        self._device = context.device
        self._lock = threading.Lock()
        taken = [tensor for tensor in base.tensors if self._takers(tensor)]
        self._tiles = tiles_of_shards(
            taken,
            functools.partial(self._weight, TILE_ELEMENTS[self._device.type]),
            num_abreast=context.num_threads,
            num_jobs=len(state.jobs),
        )
        self._stopped = False
        self._descriptors: dict[Path, int] = {}
        """Of the base's shards and the adapters' weights."""
        self._buffers = TileBuffers(self._device)
        on_gpu = self._device.type == "cuda"
        self._streams = iter(streams_of(self._device, context.num_threads) if on_gpu else ())

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
        """Close the files of base and adapters; call once all threads have ended."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _next_tile(self) -> Tile | None:
        with self._lock:
            if self._stopped or self._state.over:
                return None
            return next(self._tiles, None)

    def _weight(self, num_elements: int, tensor: OutputTensor) -> tuple[WeightInWork, tuple[slice, ...]]:
        """Return a tensor as it is taken up, and its tiles.

        Raises:
            BadInputError: it is stored in 4-bit in another shape than the configuration's.
        """
        quantized = None
        if tensor.stored is None:
            assert self._quantized is not None
            quantized = self._quantized.weight(tensor.name)
            if quantized.shape != tensor.shape:
                raise BadInputError(
                    f"{self._base.source.directory}: tensor {tensor.name} is stored as "
                    f"{list(quantized.shape)}, config.json makes it {list(tensor.shape)}; the checkpoint is corrupt"
                )
            if self._base.form is not None:
                self._state.count(base=self._quantized.num_stored_bytes(tensor.name))
        tiling = Tiling.of(tensor.shape, quantized.row_alignment if quantized else 1, num_elements)
        return WeightInWork(tensor, quantized, tiling.num_columns, len(tiling.rows)), tiling.rows

    def _computed(self, tensor: OutputTensor) -> bool:
        if tensor.num_bytes == 0:
            return False
        return not tensor.copied or any(tensor.name in job.in_work.deltas for job in self._state.jobs)

    def _takers(self, tensor: OutputTensor) -> list[Job]:
        return [job for job in self._state.jobs if job.in_work.streams(tensor.name)]

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = open_foreign(path, any_size=True).descriptor
            return self._descriptors[path]

    def _finish(self, tile: Tile) -> None:
        """Read a tile once, and make, write and prove it for all jobs that take it."""
        takers = self._state.well(self._takers(tile.weight.tensor))
        if not takers:
            return
        made_from = None if self._in_place(tile, len(takers)) else self._read(tile)
        known = self._read_anew(tile)
        for job in takers:
            self._finish_for(job, tile, made_from, known)
        self._end(tile.weight)

    def _finish_for(self, job: Job, tile: Tile, made_from: torch.Tensor | None, known: torch.Tensor | None) -> None:
        tensor = tile.weight.tensor
        with self._state.of(job) as writer:
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
            with self._state.of(job) as writer:
                if writer is None:
                    return
                expected = self._expect(tally, tile, known)
                self._make(target_OI, tile, job, made_from, expected)
                if shard.cloned and tensor.name in job.in_work.kept:
                    shard.keep(offset, buffer)
                    self._state.count(kept=tile.num_bytes)
                else:
                    shard.write(offset, buffer)
                    self._state.count(written=tile.num_bytes)
                if self._check is not None and expected is not None:
                    self._check.judge(expected, buffer.values, (shard.name, offset))
                    self._state.count(checked=tile.num_bytes)

    def _end(self, weight: WeightInWork) -> None:
        """Count one tile of a weight less; with the last one, keep what was found and let go of what was loaded."""
        with weight.lock:
            weight.num_tiles_left -= 1
            if weight.num_tiles_left == 0:
                weight.operands.clear()
                for job_id, tally in weight.tallies.items():
                    self._state.checked(job_id, tally.summary())
                weight.tallies.clear()

    def _read_anew(self, tile: Tile) -> torch.Tensor | None:
        """Return the tile from where it comes from, for the check: what the merge has read may be changed by it."""
        if self._check is None or tile.num_bytes == 0:
            return None
        tensor = tile.weight.tensor
        path = self._base.source.directory / tensor.shard
        return self._check.weight(tensor, tile.rows, None if tensor.stored is None else self._descriptor(path))

    def _expect(self, tally: Tally | None, tile: Tile, known: torch.Tensor | None) -> Expected | None:
        if self._check is None or tally is None or known is None:
            return None
        return self._check.expect(tally, tile.rows, known, while_merging=self._device.type == "cpu")

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
        read_into(self._descriptor(path), path, target_OI, begin)
        self._state.count(base=tile.num_elements * tensor.stored.dtype.itemsize)

    def _make(
        self,
        target_OI: torch.Tensor,
        tile: Tile,
        job: Job,
        made_from: torch.Tensor | None,
        expected: Expected | None,
    ) -> None:
        """Make a tile for a job: from a tile of W, or from what is in its place already."""
        tensor = tile.weight.tensor
        if tensor.name in job.in_work.deltas:
            comparison = None if expected is None else expected.comparison
            add = self._add_on_cpu if self._device.type == "cpu" else self._add_on_device
            add(target_OI, tile, job, made_from, comparison)
            return
        if made_from is not None:
            # Written from memory even where the base could be copied: the tile is here, and the base is read once.
            target_OI.copy_(made_from)
        if self._computed(tensor):
            check_range(tensor, target_OI)

    def _operands(self, tile: Tile, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
        plan = job.in_work
        delta = plan.deltas[tile.weight.tensor.name]
        with tile.weight.lock:
            if job.id not in tile.weight.operands:
                file = self._descriptor(plan.opened.weights_path)
                a_RI = read_operand(plan.opened, delta.a_RI, file).to(self._device)
                b_OR = read_operand(plan.opened, delta.b_OR, file).to(self._device)
                tile.weight.operands[job.id] = a_RI, b_OR
                self._state.count(adapter=delta.a_RI.num_bytes + delta.b_OR.num_bytes)
            return tile.weight.operands[job.id]

    def _tally(self, weight: WeightInWork, job: Job) -> Tally | None:
        if self._check is None:
            return None
        with weight.lock:
            if job.id not in weight.tallies:
                weight.tallies[job.id] = self._check.tally(job.in_work, weight.tensor.name)
            return weight.tallies[job.id]

    def _add_on_cpu(
        self,
        target_OI: torch.Tensor,
        tile: Tile,
        job: Job,
        weight_OI: torch.Tensor | None,
        comparison: Comparison | None,
    ) -> None:
        """Add the delta to W, or to what is in its place if W is not given; do a comparison on the way."""
        tensor, scaling = tile.weight.tensor, job.in_work.deltas[tile.weight.tensor.name].scaling
        a_RI, b_OR = self._operands(tile, job)
        b_OR = b_OR[tile.rows]
        made_from = target_OI if weight_OI is None else weight_OI
        if not products.merge(
            b_OR, a_RI, scaling, target_OI, self._buffers, weight_OI=made_from, comparison=comparison
        ):
            if weight_OI is None:
                weight_OI = self._read(tile)
            for rows in strips_of(*tile.shape):
                check_range(tensor, torch.mm(b_OR[rows], a_RI).mul_(scaling).add_(weight_OI[rows]))

    def _add_on_device(
        self, target_OI: torch.Tensor, tile: Tile, job: Job, weight_OI: torch.Tensor | None, _: Comparison | None
    ) -> None:
        """Add the delta to W, which is on the device."""
        assert weight_OI is not None
        tensor, scaling = tile.weight.tensor, job.in_work.deltas[tile.weight.tensor.name].scaling
        a_RI, b_OR = self._operands(tile, job)
        sum_OI = self._buffers.get("sum", torch.float32, tile.shape, host=False)
        torch.mm(b_OR[tile.rows], a_RI, out=sum_OI)
        if scaling != 1.0:
            sum_OI.mul_(scaling)
        sum_OI.add_(weight_OI)
        rounded_OI = self._buffers.get("rounded", target_OI.dtype, tile.shape, host=False)
        rounded_OI.copy_(sum_OI)
        target_OI.copy_(rounded_OI, non_blocking=True)
        check_range(tensor, sum_OI)
        torch.cuda.current_stream(self._device).synchronize()
