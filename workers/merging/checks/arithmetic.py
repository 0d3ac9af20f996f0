"""Parity, first question: is each merged tensor W + delta, for the W that was asked for?

Every element of every tensor that will ship is compared with W + scaling * B @ A, for a W that is read anew. The
product is computed anew, or it is the merge's, where a projection proves it to be B @ A. What is compared are the bytes
on their way into the files: the same memory is written, hashed and checked, so that files which have their digests have
what was checked; files that were written to since are read again. An element may be off by half a unit in its last
place, and by what a product in float32 may be; the projection finds what is off by 1/15,000 of the lengths of its row
of B and its column of A, times the scaling.

Shape suffixes: O output features, I input features, R rank.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.errors import InternalError
from jobs.parity_report import TensorCheck
from workers.bases.forms import StoredWeight
from workers.bases.quantized_base import QuantizedBase
from workers.files.layout import ShardLayout, TensorSpec
from workers.files.tensor_io import opened, read_into
from workers.merging.base_plan import BasePlan
from workers.merging.checks.evidence import Evidence
from workers.merging.checks.judgement import check_equal, differs, judge
from workers.merging.checks.proof import Operands
from workers.merging.checks.tally import Sums, Tally
from workers.merging.output import OutputTensor
from workers.merging.plan import MergePlan
from workers.numerics import products
from workers.numerics.rounding import precision_for
from workers.numerics.tiles import TILE_ELEMENTS, TileBuffers, Tiling, columns_of, single_threads, strips_of


@dataclass(frozen=True, slots=True)
class Expected:
    """What rows of a merged tensor have to be: rows of W, read anew, plus the delta of one job."""

    tally: Tally
    rows: slice
    weight_OI: torch.Tensor
    comparison: products.Comparison | None
    """What the merge compares on its way, if it does."""


class ArithmeticCheck:
    """The check of one pass, of what is expected of a tile and how it is judged; threads share it."""

    def __init__(self, base: BasePlan, quantized: QuantizedBase | None, device: torch.device) -> None:
        """Start a check.

        Args:
            base: the planned base.
            quantized: its weights in 4-bit, where the plan asks for them.
            device: where these are dequantized; tiles are compared on the CPU.
        """
        self._base = base
        self._quantized = quantized
        self._buffers = TileBuffers(device)
        self._opened = threading.local()
        self._lock = threading.Lock()
        self._evidence: dict[str, Evidence] = {}
        self.seconds = 0.0
        """Of all threads together."""

    @property
    def quantization_errors(self) -> Mapping[str, float]:
        """What 4 bits changed of W, by tensor, where it is known."""
        return {} if self._quantized is None else self._quantized.errors

    def tally(self, plan: MergePlan, name: str, place: tuple[ShardLayout, TensorSpec]) -> Tally:
        """Return what the tiles of a tensor are counted in.

        Args:
            plan: of a job of the pass, or a part of it.
            name: of the tensor.
            place: where it goes.

        Raises:
            BadInputError: the adapter's files cannot be read any more.
        """
        with self._lock:
            if plan.request.id not in self._evidence:
                self._evidence[plan.request.id] = Evidence(plan)
        return Tally(place, name, self._evidence[plan.request.id])

    def row_alignment(self, tensor: OutputTensor) -> int:
        """Return what rows of a tensor of the base are read in multiples of."""
        return self._quantized_weight(tensor.name).row_alignment if tensor.stored is None else 1

    def weight(self, tensor: OutputTensor, rows: slice, descriptor: int | None = None) -> torch.Tensor:
        """Read rows of W anew, or dequantize them; the next call of this thread may overwrite them.

        Args:
            tensor: of the base.
            rows: a tile of it, as `Tiling` cuts it: where W is in 4-bit, of whole blocks.
            descriptor: of the file it is stored in, where that is open already.

        Returns:
            [rows, columns] on the CPU, in the dtype W is stored in.
        """
        begin = time.perf_counter()
        num_columns = columns_of(tensor.shape)
        shape = rows.stop - rows.start, num_columns
        if tensor.stored is None:
            weight = self._quantized_weight(tensor.name)
            memory = self._buffers.get("dequantized", weight.dtype, shape, host=True)
            weight_OI = weight.dequantize_rows(rows.start, rows.stop, memory)
            if weight_OI.device.type != "cpu":
                weight_OI = memory.copy_(weight_OI)
        else:
            path, spec = self._base.source.directory / tensor.shard, tensor.stored
            weight_OI = self._buffers.get("stored", spec.dtype, shape, host=True)
            with opened(path) if descriptor is None else contextlib.nullcontext(descriptor) as source:
                read_into(source, path, weight_OI, spec.begin + rows.start * num_columns * spec.dtype.itemsize)
        self._took(begin)
        return weight_OI

    def expect(self, tally: Tally, rows: slice, weight_OI: torch.Tensor, *, while_merging: bool = False) -> Expected:
        """Return what rows of a merged tensor have to be.

        Args:
            tally: of the tensor.
            rows: a tile of it.
            weight_OI: these rows of W, as `weight` returned them.
            while_merging: whether the merge compares them on its way, with its own product, where it has the precision
                for that.
        """
        begin, operands, comparison = time.perf_counter(), tally.operands, None
        if while_merging and operands is not None and precision_for(tally.spec.dtype) is torch.float32:
            comparison = operands.comparison(weight_OI, scaling=operands.scaling)
        self._took(begin)
        return Expected(tally, rows, weight_OI, comparison)

    def judge(self, expected: Expected, merged: torch.Tensor, place: tuple[str, int] | None = None) -> None:
        """Count what rows of a merged tensor are against what they have to be.

        What the merge compared on its way is not trusted: it is taken where a projection proves it.

        Args:
            expected: of these rows.
            merged: uint8, the bytes that go there.
            place: where they go: the shard's name, and the offset in it; None for nowhere.

        Raises:
            InternalError: they go to another place than the plan says.
        """
        begin = time.perf_counter()
        tally, rows, weight_OI = expected.tally, expected.rows, expected.weight_OI
        spec = tally.spec
        planned = tally.shard, spec.begin + rows.start * weight_OI.shape[1] * spec.dtype.itemsize
        if place is not None and place != planned:
            raise InternalError(f"rows {rows.start} to {rows.stop} of {tally.name} go to {place}, expected {planned}")
        merged_OI = merged.view(spec.dtype).view(weight_OI.shape)
        if tally.operands is not None:
            sums = self._check(merged_OI, weight_OI, tally.operands, rows, expected.comparison)
            sums.changed = tally.changed or differs(merged_OI, weight_OI)
        elif weight_OI.dtype == merged_OI.dtype:
            sums = check_equal(merged_OI, weight_OI)
        else:
            sums = self._check_rounded(merged_OI, weight_OI)
            sums.changed = sums.num_bad_elements > 0
        tally.add(rows.start, sums)
        self._took(begin)

    def files(
        self,
        plan: MergePlan,
        directory: Path,
        *,
        num_threads: int,
        stop: Callable[[], None],
    ) -> dict[str, TensorCheck]:
        """Compare streamed tensors as they are in files.

        Args:
            plan: of the job, or a part of it: of these files.
            directory: of the files.
            num_threads: tensors compared at the same time.
            stop: raises CancelledError when the job should stop; called once per tensor.

        Returns:
            What was found, by tensor.
        """

        def compared(tensor: OutputTensor) -> TensorCheck:
            stop()
            tally = self.tally(plan, tensor.name, plan.merged.tensors[tensor.name])
            tiling = Tiling.of(tensor.shape, self.row_alignment(tensor), TILE_ELEMENTS["cpu"])
            row_bytes = tiling.num_columns * tally.spec.dtype.itemsize
            path = directory / tally.shard
            with opened(path) as descriptor:
                for rows in tiling.rows if tensor.num_bytes else ():
                    offset = tally.spec.begin + rows.start * row_bytes
                    num_bytes = (rows.stop - rows.start) * row_bytes
                    merged = self._buffers.get("merged", torch.uint8, (1, num_bytes), host=True).view(-1)
                    read_into(descriptor, path, merged, offset)
                    expected = self.expect(tally, rows, self.weight(tensor, rows))
                    self.judge(expected, merged, (tally.shard, offset))
            return tally.summary()

        streamed = [tensor for tensor in self._base.tensors if plan.streams(tensor.name)]
        with single_threads(num_threads, "check") as pool:
            return {check.tensor: check for check in pool.map(compared, streamed)}

    def _quantized_weight(self, name: str) -> StoredWeight:
        """Return a weight in 4-bit; it is opened once for the tiles of it that a thread takes in a row."""
        assert self._quantized is not None
        if getattr(self._opened, "name", None) != name:
            self._opened.weight = self._quantized.weight(name)
            self._opened.name = name
        weight: StoredWeight = self._opened.weight
        return weight

    def _took(self, begin: float) -> None:
        seconds = time.perf_counter() - begin
        with self._lock:
            self.seconds += seconds

    def _check(
        self,
        merged_OI: torch.Tensor,
        weight_OI: torch.Tensor,
        operands: Operands,
        rows: slice,
        found: products.Comparison | None,
    ) -> Sums:
        """Check rows that something was added to."""
        if precision_for(merged_OI.dtype) is torch.float32:
            if found is None:
                found = operands.comparison(weight_OI, scaling=operands.scaling)
                b_OR, a_RI = operands.b_OR[rows], operands.a_RI
                products.merge(b_OR, a_RI, operands.scaling, merged_OI, self._buffers, comparison=found)
            if operands.proves(rows, found.projections_OC):
                return judge(found, merged_OI, operands, rows)
        found = operands.comparison(weight_OI, scaling=1.0)
        products.merge(operands.scaled_b(rows), operands.a_RI, 1.0, merged_OI, self._buffers, comparison=found)
        return judge(found, merged_OI, operands, rows)

    def _check_rounded(self, merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> Sums:
        """Check rows that are to be W in another dtype: W and zero times zero."""
        sums = Sums()
        merged, weight = merged_OI.view(-1), weight_OI.view(-1)
        for part in strips_of(len(weight), 1):
            nothing = torch.zeros(1, part.stop - part.start, dtype=precision_for(merged.dtype))
            found = products.Comparison.of(weight[part].view(1, -1), nothing.view(-1).numpy(), 1.0)
            piece = merged[part].view(1, -1)
            products.merge(nothing[:, :1], nothing, 1.0, piece, self._buffers, comparison=found)
            sums.add(judge(found, piece, None, part))
        return sums
