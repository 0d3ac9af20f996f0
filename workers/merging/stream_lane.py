"""The stream lane of a pass: one walk over a base that makes, for all jobs, what is copied and what is streamed.

Each tile of a weight is read (or dequantized) once; every adapter's delta is added to it (`making.py`), once for all
jobs that want the same numbers. It is handed over to be written at its final offset, or what it becomes in a form, and
checked in the very memory it is written and hashed from.

Shape suffixes: O output features, I input features.
"""

import contextlib
import functools
import threading
from collections.abc import Sequence

import torch

from jobs.errors import BadInputError, ParityFailedError
from workers.bases.quantized_base import QuantizedBase
from workers.files.buffers import Buffer
from workers.files.shard import ShardWriter
from workers.merging.base_plan import BasePlan
from workers.merging.checks.arithmetic import ArithmeticCheck, Expected
from workers.merging.checks.tally import Tally
from workers.merging.context import Context
from workers.merging.form_tiles import FormedWeight
from workers.merging.job import Job
from workers.merging.leaders import groups_of
from workers.merging.making import TileMaker
from workers.merging.output import OutputTensor
from workers.merging.passes import PassState
from workers.merging.tile_reading import TileReader
from workers.merging.work import Tile, WeightInWork, tiles_of_shards
from workers.numerics.device import streams_of
from workers.numerics.kernels.differences import num_different
from workers.numerics.tiles import TILE_ELEMENTS, TileBuffers, Tiling, aligned_rows


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
        self._maker = TileMaker(state.jobs, self._reader, self._buffers, self._device)
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

    def _takers(self, tensor: OutputTensor) -> list[Job]:
        return [job for job in self._state.jobs if job.in_work.streams(tensor.name)]

    def _finish(self, tile: Tile) -> None:
        """Read a tile once, and make, write and prove it for all jobs that take it."""
        takers = self._state.well(self._takers(tile.weight.tensor))
        if not takers:
            return
        groups = groups_of(takers)
        made_from = self._maker.read(tile, len(groups))
        known = self._read_anew(tile)
        for leader, members in groups:
            self._finish_for(leader, members, tile, made_from, known)
        self._state.end_tile(tile.weight, {} if self._check is None else self._check.quantization_errors)

    def _finish_for(
        self,
        leader: Job,
        members: Sequence[Job],
        tile: Tile,
        made_from: torch.Tensor | None,
        known: torch.Tensor | None,
    ) -> None:
        """Make a tile once for jobs that want the same numbers, and hand it to each.

        Args:
            leader: of the jobs; it may have failed.
            members: those that go on, the leader first if it is one of them.
            tile: which one.
            made_from: W, where it is not read into the memory of the tile.
            known: W, read anew.
        """
        places = {job.id: self._place(job, tile) for job in members}  # what has no elements has a place with each, too
        if tile.num_bytes == 0:
            return
        # Made where it is written from, if anyone writes it as it is.
        owner = next((job for job in members if places[job.id] is not None), leader)
        with contextlib.ExitStack() as held:
            buffer = None
            if (place := places.get(owner.id)) is not None:
                shard, offset = place
                buffer = held.enter_context(shard.buffer(offset, tile.num_bytes))
            made_OI = self._numbers(tile, buffer)
            if made_from is None:
                self._reader.read(tile, made_OI)  # what goes wrong here is not these jobs' failure alone
            expected = None
            with self._state.of_all(members):
                expected = self._expect(self._tally(tile.weight, leader), tile, known)
                self._maker.make(made_OI, tile, leader, made_from, None if expected is None else expected.comparison)
            for job in members:
                self._hand_over(job, tile, made_OI, buffer if job is owner else None, expected)
            with self._state.of_all(members):
                if self._check is not None and expected is not None:
                    planned = None if place is None or owner is not leader else (place[0].name, place[1])
                    self._check.judge(expected, made_OI.view(-1).view(torch.uint8), planned)

    def _hand_over(
        self, job: Job, tile: Tile, made_OI: torch.Tensor, buffer: Buffer | None, expected: Expected | None
    ) -> None:
        """Have a tile written for a job, or what it becomes in the form of its release.

        Args:
            job: of the pass.
            tile: which one.
            made_OI: its numbers.
            buffer: has them, if they are to be written from there.
            expected: what they have to be.
        """
        with self._state.of(job) as writer:
            if writer is None:
                return
            num_bytes, is_kept = tile.num_bytes, False
            if (formed := self._formed(tile.weight, job)) is not None:
                was_OI = expected.weight_OI if expected is not None and expected.tally.targeted else None
                num_bytes = formed.put(writer, tile.rows, made_OI, was_OI)
            elif (place := self._place(job, tile)) is not None:
                shard, offset = place
                is_kept = buffer is not None and shard.cloned and tile.weight.tensor.name in job.in_work.kept
                if buffer is None:
                    _write_copy(shard, offset, made_OI, tile.weight.tensor.name)
                elif is_kept:
                    shard.keep(offset, buffer)
                else:
                    shard.write(offset, buffer)
            written, kept = (0, num_bytes) if is_kept else (num_bytes, 0)
            self._state.count(written=written, kept=kept, checked=0 if expected is None else num_bytes)

    def _place(self, job: Job, tile: Tile) -> tuple[ShardWriter, int] | None:
        """Return where a job writes the numbers of a tile: a file, and the offset in it; None for nowhere."""
        tensor = tile.weight.tensor
        with self._state.of(job) as writer:
            if writer is None or self._formed(tile.weight, job) is not None:
                return None
            shard, spec = writer.locate(tensor.name)
            return shard, spec.begin + tile.rows.start * tile.weight.num_columns * tensor.dtype.itemsize
        return None

    def _numbers(self, tile: Tile, buffer: Buffer | None) -> torch.Tensor:
        """Return memory for a tile: that of a buffer, or this thread's."""
        dtype = tile.weight.tensor.dtype
        if buffer is not None:
            return buffer.view(dtype, tile.shape)
        return self._buffers.get("numbers", dtype, tile.shape, host=True)

    def _read_anew(self, tile: Tile) -> torch.Tensor | None:
        """Return the tile from where it comes from, for the check: what the merge has read may be changed by it."""
        if self._check is None or tile.num_bytes == 0:
            return None
        return self._check.weight(tile.weight.tensor, tile.rows, self._reader.of_tile(tile))

    def _expect(self, tally: Tally | None, tile: Tile, known: torch.Tensor | None) -> Expected | None:
        if self._check is None or tally is None or known is None:
            return None
        return self._check.expect(tally, tile.rows, known, while_merging=self._device.type == "cpu")

    def _tally(self, weight: WeightInWork, leader: Job) -> Tally | None:
        if self._check is None:
            return None
        with weight.lock:
            if leader.id not in weight.tallies:
                name, plan = weight.tensor.name, leader.in_work
                layout = plan.merged if name in plan.requantized else leader.written
                weight.tallies[leader.id] = self._check.tally(plan, name, layout.tensors[name])
            return weight.tallies[leader.id]

    def _formed(self, weight: WeightInWork, job: Job) -> FormedWeight | None:
        name = weight.tensor.name
        if not job.quantizes_tiles or name not in job.in_work.requantized:
            return None
        with weight.lock:
            if job.id not in weight.formed:
                is_checked = self._check is not None
                weight.formed[job.id] = FormedWeight(job.in_work, name, self._buffers, checked=is_checked)
            return weight.formed[job.id]


def _write_copy(shard: ShardWriter, offset: int, made_OI: torch.Tensor, name: str) -> None:
    """Have a tile written from a copy, which is compared with it.

    Raises:
        ParityFailedError: the copy is none.
    """
    made = made_OI.view(-1).view(torch.uint8)
    with shard.buffer(offset, made.numel()) as copy:
        copy.values.copy_(made)
        if number := num_different(copy.values, made):
            raise ParityFailedError(f"tensor {name}: {number} bytes are not those that were merged")
        shard.write(offset, copy)
