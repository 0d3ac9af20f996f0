"""Parity, first question: is each merged tensor W + delta, for the W that was asked for?

Every element of every tensor of the files that will ship is compared with W + scaling * B @ A, computed anew from base
and adapter by another route than the merge takes. The bound is what one correct rounding allows: half a unit in the
last place of the merged value, plus the error of a float32 sum of R products and W. Unchanged tensors have to be equal
bit for bit. A single wrong bit in a single element is beyond it, with two exceptions that no check by value can see: in
16 bits, an element so close to the middle of two values that float32 cannot tell which one is right; in float32, the
last bits, which the order of the products decides.

Shape suffixes: O output features, I input features, R rank.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from jobs.release import TensorCheck
from workers import kernels
from workers.checkpoint import TensorSpec
from workers.lanes.lora import read_operand
from workers.module_weights import ModuleWeights
from workers.plan import BasePlan, MergePlan, OutputTensor
from workers.probes import check_modules
from workers.quantized_base import QuantizedBase
from workers.rounding import BITS, EXPONENT_BITS, MANTISSA_BITS, half_ulp, precision_for
from workers.tensor_io import opened, read_into
from workers.tiles import TileBuffers, rows_per_tile, single_threads

TILE_ELEMENTS = 1 << 19
_NUM_PLACES = 1 << 12
"""Elements of a tile that are looked at one by one; where more are in doubt, it is all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckJob:
    """One merged checkpoint to check."""

    plan: MergePlan
    directory: Path
    """Where its files are."""
    check: Callable[[], None]
    """Raises CancelledError when the job should stop; called once per tensor."""


@dataclass(slots=True)
class _Sums:
    """What is gathered about one tensor of one job, over its tiles."""

    max_abs_error: float = 0.0
    rounding_excess: float = 0.0
    num_bad_elements: int = 0
    weight_square: float = 0.0
    delta_square: float = 0.0
    kept: float = 0.0
    """<merged - W, delta>."""

    def add(self, other: "_Sums") -> None:
        self.max_abs_error = max(self.max_abs_error, other.max_abs_error)
        self.rounding_excess = max(self.rounding_excess, other.rounding_excess)
        self.num_bad_elements += other.num_bad_elements
        self.weight_square += other.weight_square
        self.delta_square += other.delta_square
        self.kept += other.kept


def check_arithmetic(
    base: BasePlan,
    quantized: QuantizedBase | None,
    weights: ModuleWeights | None,
    jobs: Sequence[CheckJob],
    *,
    num_threads: int,
    on_bytes: Callable[[int], None],
) -> dict[str, tuple[TensorCheck, ...]]:
    """Check every tensor of the merged checkpoints of a pass; each tile of W is read once for all of them.

    Args:
        base: the planned base.
        quantized: its weights in 4-bit, where the plan asks for them.
        weights: its weights for PEFT, where a plan leaves any to it.
        jobs: the checkpoints; CancelledError of one ends the check of all.
        num_threads: tensors checked at the same time.
        on_bytes: told the bytes of merged tensors checked, as they are.

    Returns:
        One check for each tensor, in the order of the plan, by request id.
    """
    results: dict[str, dict[str, TensorCheck]] = {job.plan.request.id: {} for job in jobs}
    stream = _Check(base, quantized, jobs, on_bytes)
    with single_threads(num_threads, "check") as pool:
        for checks in pool.map(stream.tensor, base.tensors):
            for name, check in checks.items():
                results[name][check.tensor] = check
        for job in jobs:
            if job.plan.by_peft:
                assert weights is not None
                found = pool.submit(check_modules, job.plan, job.directory, weights, job.check, on_bytes)
                results[job.plan.request.id] |= found.result()
    errors = {} if quantized is None else quantized.errors
    return {
        name: tuple(
            results[name][tensor.name].model_copy(update={"quantization_error": errors.get(tensor.name)})
            for tensor in job.plan.tensors
        )
        for name, job in zip(results, jobs, strict=True)
    }


@dataclass(frozen=True, slots=True)
class _Operands:
    """The delta of one weight: lora_A [R, I], scaling times lora_B [O, R], the largest norm of a column of lora_A."""

    a_RI: torch.Tensor
    scaled_b_OR: torch.Tensor
    max_column_norm: float


@dataclass(frozen=True, slots=True)
class _Subject:
    """One tensor of one job."""

    job: CheckJob
    path: Path
    descriptor: int
    spec: TensorSpec
    operands: _Operands | None
    sums: _Sums = field(default_factory=_Sums)


class _Check:
    """The check of one pass; threads share it."""

    def __init__(
        self,
        base: BasePlan,
        quantized: QuantizedBase | None,
        jobs: Sequence[CheckJob],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._base = base
        self._quantized = quantized
        self._jobs = jobs
        self._on_bytes = on_bytes
        self._buffers = TileBuffers(torch.device("cpu"))

    def tensor(self, tensor: OutputTensor) -> dict[str, TensorCheck]:
        """Check one tensor of all jobs, but those that PEFT merged."""
        jobs = [job for job in self._jobs if job.plan.streams(tensor.name)]
        if not jobs:
            return {}
        weight = None
        if self._quantized is not None and tensor.stored is None:
            weight = self._quantized.weight(tensor.name)
        alignment = weight.row_alignment if weight else 1
        step = rows_per_tile(tensor.num_rows, tensor.num_columns, alignment, TILE_ELEMENTS)
        for job in jobs:
            job.check()
        with contextlib.ExitStack() as files:
            path = self._base.source.directory / tensor.shard
            source = files.enter_context(opened(path)) if weight is None else None
            subjects = [_subject(job, tensor.name, files) for job in jobs]
            for start in range(0, tensor.num_rows if tensor.num_bytes else 0, max(step, 1)):
                rows = slice(start, min(start + step, tensor.num_rows))
                if weight is not None:
                    weight_OI = weight.dequantize_rows(rows.start, rows.stop).cpu()
                else:
                    assert source is not None
                    assert tensor.stored is not None
                    weight_OI = self._read("stored", source, path, tensor.stored, rows)
                for subject in subjects:
                    merged_OI = self._read("merged", subject.descriptor, subject.path, subject.spec, rows)
                    subject.sums.add(self._check_tile(merged_OI, weight_OI, subject.operands, rows))
                    self._on_bytes(merged_OI.numel() * merged_OI.itemsize)
        return {
            subject.job.plan.request.id: _summarize(tensor.name, subject.sums, subject.operands is not None)
            for subject in subjects
        }

    def _read(self, use: str, descriptor: int, path: Path, spec: TensorSpec, rows: slice) -> torch.Tensor:
        num_columns = spec.row_bytes // spec.dtype.itemsize
        tile_OI = self._buffers.get(use, spec.dtype, (rows.stop - rows.start, num_columns), host=True)
        read_into(descriptor, path, tile_OI, spec.begin + rows.start * spec.row_bytes)
        return tile_OI

    def _check_tile(
        self, merged_OI: torch.Tensor, weight_OI: torch.Tensor, operands: _Operands | None, rows: slice
    ) -> _Sums:
        dtype = merged_OI.dtype
        if operands is None and weight_OI.dtype == dtype:
            return _check_equal(merged_OI, weight_OI)
        num_rows, num_columns = merged_OI.shape
        delta_OI = self._buffers.get("delta", precision_for(dtype), (num_rows, num_columns), host=True)
        if operands is None:
            delta_OI.zero_()
        else:
            torch.mm(operands.scaled_b_OR[rows], operands.a_RI, out=delta_OI)
        if weight_OI.dtype not in kernels.ARRAY_DTYPES:
            weight_OI = weight_OI.float()
        places = self._buffers.get("places", torch.int64, (1, _NUM_PLACES), host=True).view(-1)
        weight_square, delta_square, error_delta, max_abs_error, num_different = kernels.compare(
            kernels.array(weight_OI), kernels.array(merged_OI), kernels.array(delta_OI), places.numpy()
        )
        sums = _Sums(
            max_abs_error=_finite(max_abs_error),
            rounding_excess=1.0 if max_abs_error > 0 else 0.0,
            weight_square=weight_square,
            delta_square=delta_square,
            kept=delta_square + error_delta,  # merged - W is the delta and the error
        )
        if not math.isfinite(max_abs_error) or num_different > _NUM_PLACES:
            places = torch.arange(merged_OI.numel())  # infinity equals itself, and is as wrong as NaN
        else:
            places = places[:num_different]
        if len(places):
            # What is not the value nearest to W + delta as computed here may be the one nearest to the exact sum.
            merged, weight, delta = (tensor.view(-1)[places] for tensor in (merged_OI, weight_OI, delta_OI))
            error = merged.to(delta.dtype).sub_(weight.to(delta.dtype).add_(delta)).abs_()
            excess = error.div_(_bounds(merged, operands, rows, places // num_columns))
            sums.rounding_excess = max(sums.rounding_excess, _largest(excess))
            # NaN compares false with everything, so what is not within the bound is counted, not what is beyond it.
            sums.num_bad_elements = len(places) - int((excess <= 1).sum())
        return sums


def _subject(job: CheckJob, name: str, files: contextlib.ExitStack) -> _Subject:
    shard, spec = job.plan.output.tensors[name]
    path = job.directory / shard.name
    return _Subject(job, path, files.enter_context(opened(path)), spec, _operands(job.plan, name))


def _operands(plan: MergePlan, name: str) -> _Operands | None:
    delta = plan.deltas.get(name)
    if delta is None:
        return None
    precision = precision_for(plan.base.by_name[name].dtype)
    a_RI = read_operand(plan.opened, delta.a_RI).to(precision)
    # Unlike the merge, the scaling goes into B in float64 first: the two must not share a slip.
    scaled_b_OR = (read_operand(plan.opened, delta.b_OR).double() * delta.scaling).to(precision)
    return _Operands(a_RI, scaled_b_OR, float(torch.linalg.vector_norm(a_RI, dim=0).max()))


def _bounds(merged: torch.Tensor, operands: _Operands | None, rows: slice, row_of_each: torch.Tensor) -> torch.Tensor:
    """Return what one correct rounding allows at some merged elements; their rows are counted from that of the tile."""
    precision = precision_for(merged.dtype)
    bounds = half_ulp(merged).to(precision)
    if operands is None:
        return bounds
    # A sum of R products in float32, here and in the merge, errs by at most about R + 3 roundings of the terms (Higham,
    # Accuracy and Stability of Numerical Algorithms, 3.1); |b . a| is bounded by the norms.
    num_roundings = operands.a_RI.shape[0] + 3
    slack_O = torch.linalg.vector_norm(operands.scaled_b_OR[rows], dim=1) * operands.max_column_norm
    if precision is torch.float32:
        # W + delta is rounded to float32 before it is rounded to the output's dtype: by at most 2**-23 of the power of
        # two below the value, of which half a unit in the last place is 2**-(mantissa bits + 1).
        bounds *= 1 + 2.0 ** (MANTISSA_BITS[merged.dtype] - 22)
    return bounds.add_(slack_O[row_of_each], alpha=2 * num_roundings * torch.finfo(torch.float32).eps)


def _check_equal(merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> _Sums:
    sums = _Sums()
    if weight_OI.is_floating_point():
        known = weight_OI if weight_OI.dtype in kernels.ARRAY_DTYPES else weight_OI.float()
        sums.weight_square = kernels.square(kernels.array(known))
    if torch.equal(_bits(merged_OI), _bits(weight_OI)):
        return sums
    different = _bits(merged_OI) != _bits(weight_OI)
    error = (merged_OI.double() - weight_OI.double()).abs()[different]
    sums.num_bad_elements = int(different.sum())
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


def _summarize(name: str, sums: _Sums, changed: bool) -> TensorCheck:
    return TensorCheck(
        tensor=name,
        changed=changed,
        max_abs_error=sums.max_abs_error,
        rounding_excess=sums.rounding_excess,
        num_bad_elements=sums.num_bad_elements,
        weight_norm=math.sqrt(_finite(sums.weight_square)),
        delta_norm=math.sqrt(_finite(sums.delta_square)),
        survival=sums.kept / sums.delta_square if sums.delta_square > 0 and math.isfinite(sums.kept) else None,
    )


def failures(checks: Sequence[TensorCheck], max_rounding_excess: float) -> Mapping[str, str]:
    """Return one sentence for each tensor that is not what it should be, by tensor, the worst first."""
    bad = [c for c in checks if c.rounding_excess > max_rounding_excess or (c.num_bad_elements and not c.changed)]
    bad.sort(key=lambda c: (c.rounding_excess, c.max_abs_error), reverse=True)
    return {
        check.tensor: (
            f"tensor {check.tensor}: {check.num_bad_elements} elements are not base + delta: off by up to "
            f"{check.max_abs_error:.3g}, {check.rounding_excess:.3g} times what one rounding allows"
        )
        for check in bad
    }
