"""Parity, first question: is each merged tensor W + delta, for the W that was asked for?

Every element of every tensor that will ship is compared with W + scaling * B @ A, for a W that is read anew. The
product is computed anew, or it is the merge's, where a projection proves it to be B @ A. What is compared are the bytes
on their way into the files: the same memory is written, hashed and checked, so that files which have their digests have
what was checked; files that somebody wrote to since are read again. An element may be off by half a unit in its last
place, and by what a product in float32 may be; the projection finds what is off by 1/15,000 of the lengths of its row
of B and its column of A, times the scaling.

Shape suffixes: O output features, I input features, R rank.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.errors import InternalError
from jobs.release import TensorCheck
from workers.bases.four_bit import QuantizedWeight
from workers.bases.quantized_base import QuantizedBase
from workers.files.tensor_io import opened, read_into
from workers.merging.evidence import Evidence
from workers.merging.plan import BasePlan, MergePlan, OutputTensor
from workers.merging.proof import SPARSE, Operands
from workers.numerics import products
from workers.numerics.kernels import merging
from workers.numerics.kernels.elements import ARRAY_DTYPES, array
from workers.numerics.products import lifted
from workers.numerics.rounding import BITS, EXPONENT_BITS, MANTISSA_BITS, half_ulp, precision_for
from workers.numerics.tiles import (
    TILE_ELEMENTS,
    TileBuffers,
    Tiling,
    columns_of,
    pieces_of,
    rows_per_tile,
    single_threads,
)

_JUDGED_ELEMENTS = 1 << 16
"""Elements that are held against the exact sum at the same time."""


@dataclass(slots=True)
class _Sums:
    """What is gathered about one tensor of one job, over its tiles."""

    max_abs_error: float = 0.0
    rounding_excess: float = 0.0
    num_bad_elements: int = 0
    changed: bool = False
    """Whether some element is not W."""
    weight_square: float = 0.0
    delta_square: float = 0.0
    kept: float = 0.0
    """<merged - W, delta>."""

    def add(self, other: "_Sums") -> None:
        self.max_abs_error = max(self.max_abs_error, other.max_abs_error)
        self.rounding_excess = max(self.rounding_excess, other.rounding_excess)
        self.num_bad_elements += other.num_bad_elements
        self.changed |= other.changed
        self.weight_square += other.weight_square
        self.delta_square += other.delta_square
        self.kept += other.kept


class Tally:
    """What is found about one tensor of one job, over its tiles; several threads add to it."""

    def __init__(self, plan: MergePlan, name: str, evidence: Evidence) -> None:
        """Start with nothing found.

        Args:
            plan: says where the tensor goes.
            name: of the tensor.
            evidence: what the adapter says of it.
        """
        shard, spec = plan.output.tensors[name]
        self.name = name
        self.shard = shard.name
        self.spec = spec
        self._evidence = evidence
        self._targeted = name in evidence.pairs
        self._sums: dict[int, _Sums] = {}
        """By the row they begin at."""
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._operands: Operands | None = None

    @property
    def operands(self) -> Operands | None:
        """The delta of the tensor; None if it is to be what it was."""
        if self._targeted and self._operands is None:
            with self._reading:
                if self._operands is None and (factors := self._evidence.factors(self.name)) is not None:
                    self._operands = Operands(*factors, precision_for(self.spec.dtype))
        return self._operands

    @property
    def changed(self) -> bool:
        """Whether some element of the tiles compared so far is not W."""
        with self._lock:
            return any(sums.changed for sums in self._sums.values())

    def add(self, start: int, sums: _Sums) -> None:
        """Add what was found about the rows from `start` on."""
        with self._lock:
            self._sums[start] = sums

    def summary(self) -> TensorCheck:
        """Return what was found, once all tiles are compared."""
        sums = _Sums()
        for start in sorted(self._sums):  # added up in one order, whoever was first: reports have the same bytes
            sums.add(self._sums[start])
        return TensorCheck(
            tensor=self.name,
            changed=sums.changed,
            targeted=self._targeted,
            max_abs_error=sums.max_abs_error,
            rounding_excess=sums.rounding_excess,
            num_bad_elements=sums.num_bad_elements,
            weight_norm=math.sqrt(_finite(sums.weight_square)),
            delta_norm=math.sqrt(_finite(sums.delta_square)),
            survival=sums.kept / sums.delta_square if sums.delta_square > 0 and math.isfinite(sums.kept) else None,
        )


class ArithmeticCheck:
    """The check of one pass; threads share it."""

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

    def tally(self, plan: MergePlan, name: str) -> Tally:
        """Return what the tiles of a tensor are counted in.

        Args:
            plan: of a job of the pass, or a part of it.
            name: of the tensor.

        Raises:
            BadInputError: the adapter's files cannot be read any more.
        """
        with self._lock:
            if plan.request.id not in self._evidence:
                self._evidence[plan.request.id] = Evidence(plan)
        return Tally(plan, name, self._evidence[plan.request.id])

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

    def on_the_way(self, tally: Tally, weight_OI: torch.Tensor) -> products.Comparison | None:
        """Begin a comparison that the merge can do while it merges.

        Args:
            tally: of the tensor.
            weight_OI: rows of W, as `weight` returned them.

        Returns:
            None if nothing is added to the tensor, or if it takes another precision than the merge's.
        """
        begin, operands = time.perf_counter(), tally.operands
        self._took(begin)
        if operands is None or precision_for(tally.spec.dtype) is not torch.float32:
            return None
        return operands.comparison(weight_OI, scaling=operands.scaling)

    def compare(
        self,
        tally: Tally,
        rows: slice,
        place: tuple[str, int],
        merged: torch.Tensor,
        weight_OI: torch.Tensor,
        *,
        found: products.Comparison | None = None,
    ) -> None:
        """Compare rows of a merged tensor with what they should be.

        Args:
            tally: of the tensor.
            rows: a tile of it.
            place: where it goes: the shard's name, and the offset in it.
            merged: uint8, the bytes that go there.
            weight_OI: these rows of W, as `weight` returned them.
            found: the comparison that was begun for them, if the merge has done it, with its own product. That is not
                trusted: it is taken where a projection proves it.

        Raises:
            InternalError: they go to another place than the plan says.
        """
        begin = time.perf_counter()
        spec = tally.spec
        expected = tally.shard, spec.begin + rows.start * weight_OI.shape[1] * spec.dtype.itemsize
        if place != expected:
            raise InternalError(f"rows {rows.start} to {rows.stop} of {tally.name} go to {place}, expected {expected}")
        merged_OI = merged.view(spec.dtype).view(weight_OI.shape)
        if tally.operands is not None:
            sums = self._check(merged_OI, weight_OI, tally.operands, rows, found)
            sums.changed = tally.changed or _differs(merged_OI, weight_OI)
        elif weight_OI.dtype == merged_OI.dtype:
            sums = _check_equal(merged_OI, weight_OI)
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
            tally = self.tally(plan, tensor.name)
            alignment = self._quantized_weight(tensor.name).row_alignment if tensor.stored is None else 1
            tiling = Tiling.of(tensor.shape, alignment, TILE_ELEMENTS["cpu"])
            row_bytes = tiling.num_columns * tally.spec.dtype.itemsize
            path = directory / tally.shard
            with opened(path) as descriptor:
                for rows in tiling.rows if tensor.num_bytes else ():
                    offset = tally.spec.begin + rows.start * row_bytes
                    num_bytes = (rows.stop - rows.start) * row_bytes
                    merged = self._buffers.get("merged", torch.uint8, (1, num_bytes), host=True).view(-1)
                    read_into(descriptor, path, merged, offset)
                    self.compare(tally, rows, (tally.shard, offset), merged, self.weight(tensor, rows))
            return tally.summary()

        streamed = [tensor for tensor in self._base.tensors if plan.streams(tensor.name)]
        with single_threads(num_threads, "check") as pool:
            return {check.tensor: check for check in pool.map(compared, streamed)}

    def _quantized_weight(self, name: str) -> QuantizedWeight:
        """Return a weight in 4-bit; it is opened once for the tiles of it that a thread takes in a row."""
        assert self._quantized is not None
        if getattr(self._opened, "name", None) != name:
            self._opened.weight = self._quantized.weight(name)
            self._opened.name = name
        weight: QuantizedWeight = self._opened.weight
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
    ) -> _Sums:
        """Check rows that something was added to."""
        if precision_for(merged_OI.dtype) is torch.float32:
            if found is None:
                found = operands.comparison(weight_OI, scaling=operands.scaling)
                b_OR, a_RI = operands.b_OR[rows], operands.a_RI
                products.merge(b_OR, a_RI, operands.scaling, merged_OI, self._buffers, comparison=found)
            if operands.proves(rows, found.projections_OC):
                return _judged(found, merged_OI, operands, rows)
        found = operands.comparison(weight_OI, scaling=1.0)
        products.merge(operands.scaled_b(rows), operands.a_RI, 1.0, merged_OI, self._buffers, comparison=found)
        return _judged(found, merged_OI, operands, rows)

    def _check_rounded(self, merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> _Sums:
        """Check rows that are to be W in another dtype: W and zero times zero."""
        sums = _Sums()
        merged, weight = merged_OI.view(-1), weight_OI.view(-1)
        for part in pieces_of(len(weight), 1):
            nothing = torch.zeros(1, part.stop - part.start, dtype=precision_for(merged.dtype))
            found = products.Comparison.of(weight[part].view(1, -1), nothing.view(-1).numpy(), 1.0)
            piece = merged[part].view(1, -1)
            products.merge(nothing[:, :1], nothing, 1.0, piece, self._buffers, comparison=found)
            sums.add(_judged(found, piece, None, part))
        return sums


def _judged(found: products.Comparison, merged_OI: torch.Tensor, operands: Operands | None, rows: slice) -> _Sums:
    """Return what a comparison comes to, once elements in doubt are held against the exact sum."""
    sums = _Sums(
        max_abs_error=_finite(found.max_abs_error),
        rounding_excess=1.0 if found.max_abs_error > 0 else 0.0,
        weight_square=found.weight_square,
        delta_square=found.delta_square,
        kept=found.delta_square + found.error_delta,  # merged - W is the delta and the error
    )
    # What is not the value nearest to W + delta as computed there may be the one nearest to the exact sum.
    for part, places in _in_doubt(found.doubtful, *merged_OI.shape):
        merged, exact = merged_OI[part].view(-1)[places], lifted(found.weight_OI[part].view(-1)[places]).double()
        bounds = half_ulp(merged).double()
        if operands is not None:
            in_tensor = slice(rows.start + part.start, rows.start + part.stop)
            delta, slack = operands.exactly(in_tensor, places)
            exact += delta
            if merged.dtype.itemsize == 2:
                # W + delta is rounded to float32 before it is rounded to the output's dtype: by at most 2**-23 of the
                # power of two below the value, of which half a unit in the last place is 2**-(mantissa bits + 1).
                bounds *= 1 + 2.0 ** (MANTISSA_BITS[merged.dtype] - 22)
            bounds += slack
        excess = merged.double().sub_(exact).abs_().div_(bounds)
        sums.rounding_excess = max(sums.rounding_excess, _largest(excess))
        # NaN compares false with everything, so what is not within the bound is counted, not what is beyond it.
        sums.num_bad_elements += len(places) - int((excess <= 1).sum())
    return sums


def _in_doubt(doubtful: torch.Tensor | None, num_rows: int, num_columns: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows, and places of elements counted from the first of these, as many as are judged at the same time.

    Args:
        doubtful: all such places, ascending; None for every one.
        num_rows: of the tile.
        num_columns: of the tile.
    """
    if doubtful is not None and not len(doubtful):
        return
    if doubtful is not None and len(doubtful) * SPARSE <= num_rows * num_columns:
        for places in doubtful.split(_JUDGED_ELEMENTS // SPARSE):
            yield slice(0, num_rows), places
        return
    step = rows_per_tile(num_rows, num_columns, 1, _JUDGED_ELEMENTS)
    for first in range(0, num_rows, step):
        part = slice(first, min(first + step, num_rows))
        begin, end = part.start * num_columns, part.stop * num_columns
        if doubtful is None:
            yield part, torch.arange(end - begin)
        else:
            yield part, doubtful[slice(*torch.searchsorted(doubtful, torch.tensor([begin, end])).tolist())] - begin


def _differs(merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether some element is not W; a few rows at a time, as the first ones tell where anything was added."""
    return any(
        not torch.equal(_bits(merged_OI[rows]), _bits(weight_OI[rows].to(merged_OI.dtype)))
        for rows in pieces_of(*weight_OI.shape)
    )


def _check_equal(merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> _Sums:
    sums = _Sums()
    if weight_OI.dtype in ARRAY_DTYPES:
        sums.weight_square, is_equal = merging.compare_unchanged(array(weight_OI), array(merged_OI))
        if is_equal:
            return sums
    for part in pieces_of(*weight_OI.shape):
        sums.add(_differences(merged_OI[part], weight_OI[part]))
    return sums


def _differences(merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> _Sums:
    sums = _Sums()
    if weight_OI.dtype not in ARRAY_DTYPES and weight_OI.is_floating_point():
        sums.weight_square = float(weight_OI.double().square().sum())
    different = _bits(merged_OI) != _bits(weight_OI)
    error = (merged_OI.double() - weight_OI.double()).abs()[different]
    sums.num_bad_elements = int(different.sum())
    sums.changed = sums.num_bad_elements > 0
    sums.max_abs_error = _largest(error)
    allowed = half_ulp(weight_OI[different]) if weight_OI.dtype in EXPONENT_BITS else 0.5
    sums.rounding_excess = _largest(error / allowed)
    return sums


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(BITS[values.itemsize])


def _largest(values: torch.Tensor) -> float:
    return _finite(float(values.amax()) if values.numel() else 0.0)


def _finite(value: float) -> float:
    # NaN and infinity have no place in a JSON report; they are as wrong as can be.
    return value if math.isfinite(value) else sys.float_info.max


def failures(checks: Sequence[TensorCheck], max_rounding_excess: float) -> Mapping[str, str]:
    """Return one sentence for each tensor that is not what it should be, by tensor, the worst first."""
    bad = [c for c in checks if c.rounding_excess > max_rounding_excess or (c.num_bad_elements and not c.targeted)]
    bad.sort(key=lambda c: (c.rounding_excess, c.max_abs_error), reverse=True)
    return {check.tensor: f"tensor {check.tensor}: {_fault(check)}" for check in bad}


def _fault(check: TensorCheck) -> str:
    excess = f"{check.rounding_excess:.3g} times what one rounding allows"
    if not check.num_bad_elements and not check.max_abs_error:  # the bits are those of a second merge
        return f"PEFT merged it, and its module does not answer as base + adapter does: off by {excess}"
    return f"{check.num_bad_elements} elements are not base + delta: off by up to {check.max_abs_error:.3g}, {excess}"
