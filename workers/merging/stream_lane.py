"""The stream lane of a pass: one walk over a base that makes, for all jobs, what is copied and what is streamed.

Each tile of a weight is read (or dequantized) once; every adapter's delta is added to it in float32, rounded once to
the output's dtype, handed over to be written at its final offset (quantized first, where a release is in a form), and
checked in the very memory it is written and hashed from. The order of operations is that of PEFT's `Linear.merge` with
`safe_merge=False` (0.21): (B @ A) in float32, times the scaling, plus W, one rounding.

Shape suffixes: O output features, I input features, R rank.
"""

import contextlib
import functools
import threading
from collections.abc import Callable

import torch

from jobs.errors import BadInputError
from workers.bases.quantized_base import QuantizedBase
from workers.files.layout import TensorSpec
from workers.files.shard import ShardWriter
from workers.merging.base_plan import BasePlan
from workers.merging.checks.arithmetic import ArithmeticCheck, Expected
from workers.merging.checks.tally import Tally
from workers.merging.context import Context
from workers.merging.form_tiles import FormedWeight
from workers.merging.job import Job
from workers.merging.output import OutputTensor
from workers.merging.passes import PassState, check_range
from workers.merging.tile_reading import TileReader
from workers.merging.work import Tile, WeightInWork, tiles_of_shards
from workers.numerics import products
from workers.numerics.device import streams_of
from workers.numerics.products import Comparison
from workers.numerics.tiles import TILE_ELEMENTS, TileBuffers, Tiling, aligned_rows, strips_of


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
        self._reader = TileReader(base, state)
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
        self._reader.close()

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
        alignment = aligned_rows(tensor.shape, 1 if quantized is None else quantized.row_alignment)
        tiling = Tiling.of(tensor.shape, alignment, num_elements)
        return WeightInWork(tensor, quantized, tiling.num_columns, len(tiling.rows)), tiling.rows

    def _computed(self, tensor: OutputTensor) -> bool:
        changed = any(tensor.name in job.in_work.deltas for job in self._state.jobs)
        return tensor.num_bytes > 0 and (changed or not tensor.copied)

    def _takers(self, tensor: OutputTensor) -> list[Job]:
        return [job for job in self._state.jobs if job.in_work.streams(tensor.name)]

    def _finish(self, tile: Tile) -> None:
        """Read a tile once, and make, write and prove it for all jobs that take it."""
        takers = self._state.well(self._takers(tile.weight.tensor))
        if not takers:
            return
        made_from = None if self._in_place(tile, len(takers)) else self._read(tile)
        known = self._read_anew(tile)
        for job in takers:
            self._finish_for(job, tile, made_from, known)
        self._state.end_tile(tile.weight, {} if self._check is None else self._check.quantization_errors)

    def _finish_for(self, job: Job, tile: Tile, made_from: torch.Tensor | None, known: torch.Tensor | None) -> None:
        with self._state.of(job) as writer:
            if writer is None:
                return
            formed = self._formed(tile.weight, job)
            place = writer.locate(tile.weight.tensor.name) if formed is None else None
            expect = functools.partial(self._expect, self._tally(tile.weight, job), tile, known)
        if writer.over or tile.num_bytes == 0:
            return
        if formed is not None:
            self._form(job, tile, made_from, expect, formed)
        elif place is not None:
            self._write(job, tile, made_from, expect, place)

    def _write(
        self,
        job: Job,
        tile: Tile,
        made_from: torch.Tensor | None,
        expect: Callable[[], Expected | None],
        place: tuple[ShardWriter, TensorSpec],
    ) -> None:
        """Make a tile in the memory that it is written from."""
        tensor, (shard, spec) = tile.weight.tensor, place
        offset = spec.begin + tile.rows.start * tile.weight.num_columns * tensor.dtype.itemsize
        with shard.buffer(offset, tile.num_bytes) as buffer:
            target_OI = buffer.view(tensor.dtype, tile.shape)
            if made_from is None:
                self._reader.read(tile, target_OI)  # what goes wrong here is not this job's failure alone
            with self._state.of(job) as writer:
                if writer is None:
                    return
                expected = expect()
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

    def _form(
        self,
        job: Job,
        tile: Tile,
        made_from: torch.Tensor | None,
        expect: Callable[[], Expected | None],
        formed: FormedWeight,
    ) -> None:
        """Make a tile, and store it in the form of a release at once."""
        numbers_OI = self._buffers.get("numbers", tile.weight.tensor.dtype, tile.shape, host=True)
        if made_from is None:
            self._reader.read(tile, numbers_OI)
        with self._state.of(job) as writer:
            if writer is None:
                return
            expected, was_OI = expect(), None
            self._make(numbers_OI, tile, job, made_from, expected)
            if self._check is not None and expected is not None:
                self._check.judge(expected, numbers_OI.view(-1).view(torch.uint8))
                was_OI = expected.weight_OI if expected.tally.targeted else None
            num_bytes = formed.put(writer, tile.rows, numbers_OI, was_OI)
            self._state.count(written=num_bytes, checked=0 if expected is None else num_bytes)

    def _read_anew(self, tile: Tile) -> torch.Tensor | None:
        """Return the tile from where it comes from, for the check: what the merge has read may be changed by it."""
        if self._check is None or tile.num_bytes == 0:
            return None
        return self._check.weight(tile.weight.tensor, tile.rows, self._reader.of_tile(tile))

    def _expect(self, tally: Tally | None, tile: Tile, known: torch.Tensor | None) -> Expected | None:
        if self._check is None or tally is None or known is None:
            return None
        return self._check.expect(tally, tile.rows, known, while_merging=self._device.type == "cpu")

    def _in_place(self, tile: Tile, num_takers: int) -> bool:
        """Whether a tile of W goes straight into the buffer it is written from, and becomes there what it is to be."""
        is_same = self._device.type == "cpu" and tile.weight.dtype == tile.weight.tensor.dtype
        return num_takers == 1 and (is_same or not self._computed(tile.weight.tensor))

    def _read(self, tile: Tile) -> torch.Tensor:
        """Return a tile of W, on the device if something is made from it."""
        quantized = tile.weight.quantized
        if quantized is not None and self._device.type != "cpu":
            return quantized.dequantize_rows(tile.rows.start, tile.rows.stop)
        weight_OI = self._buffers.get("weight", tile.weight.dtype, tile.shape, host=True)
        self._reader.read(tile, weight_OI)
        return weight_OI.to(self._device, non_blocking=True) if self._computed(tile.weight.tensor) else weight_OI

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

    def _tally(self, weight: WeightInWork, job: Job) -> Tally | None:
        if self._check is None:
            return None
        with weight.lock:
            if job.id not in weight.tallies:
                name, plan = weight.tensor.name, job.in_work
                layout = plan.merged if name in plan.requantized else job.written
                weight.tallies[job.id] = self._check.tally(plan, name, layout.tensors[name])
            return weight.tallies[job.id]

    def _formed(self, weight: WeightInWork, job: Job) -> FormedWeight | None:
        name = weight.tensor.name
        if not job.quantizes_tiles or name not in job.in_work.requantized:
            return None
        with weight.lock:
            if job.id not in weight.formed:
                is_checked = self._check is not None
                weight.formed[job.id] = FormedWeight(job.in_work, name, self._buffers, checked=is_checked)
            return weight.formed[job.id]

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
        a_RI, b_OR = self._reader.operands(tile, job, self._device)
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
        a_RI, b_OR = self._reader.operands(tile, job, self._device)
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
