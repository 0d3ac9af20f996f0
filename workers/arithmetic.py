"""Parity, first question: is each merged tensor W + delta, for the W that was asked for?

Every element of every tensor of the files that will ship is compared with W + scaling * B @ A, computed anew from base
and adapter by another route than the merge takes. The bound is what one correct rounding allows: half a unit in the
last place of the merged value, plus the error of a float32 sum of R products and W. Unchanged tensors have to be equal
bit for bit. A single wrong bit in a single element is beyond it, with two exceptions that no check by value can see: in
16 bits, an element so close to the middle of two values that float32 cannot tell which one is right; in float32, the
last bits, which the order of the products decides.

Shape suffixes: O output features, I input features, R rank.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.release import TensorCheck
from workers.lanes.lora import read_operand
from workers.module_weights import ModuleWeights
from workers.plan import BasePlan, MergePlan, OutputTensor
from workers.probes import check_modules
from workers.quant import QuantizedWeight
from workers.quantized_base import QuantizedBase
from workers.rounding import BITS, EXPONENT_BITS, MANTISSA_BITS, half_ulp, precision_for
from workers.tensor_io import read_rows
from workers.tiles import rows_per_tile, single_threads

TILE_ELEMENTS = 1 << 18


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

    def check_tensor(tensor: OutputTensor) -> dict[str, TensorCheck]:
        takers = [job for job in jobs if tensor.name not in job.plan.by_peft]
        return _check_tensor(base, quantized, tensor, takers, on_bytes) if takers else {}

    with single_threads(num_threads, "check") as pool:
        for checks in pool.map(check_tensor, base.tensors):
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


def _check_tensor(
    base: BasePlan,
    quantized: QuantizedBase | None,
    tensor: OutputTensor,
    jobs: Sequence[CheckJob],
    on_bytes: Callable[[int], None],
) -> dict[str, TensorCheck]:
    weight = quantized.weight(tensor.name) if quantized is not None and tensor.stored is None else None
    step = rows_per_tile(tensor.num_rows, tensor.num_columns, weight.row_alignment if weight else 1, TILE_ELEMENTS)
    sums = {job.plan.request.id: _Sums() for job in jobs}
    operands = {job.plan.request.id: _operands(job.plan, tensor.name) for job in jobs}
    for job in jobs:
        job.check()
    for start in range(0, tensor.num_rows, max(step, 1)):
        stop = min(start + step, tensor.num_rows)
        weight_OI = _read_weight(base, tensor, weight, start, stop)
        for job in jobs:
            shard, spec = job.plan.output.tensors[tensor.name]
            merged_OI = _as_matrix(read_rows(job.directory / shard.name, spec, start, stop))
            name = job.plan.request.id
            sums[name].add(_check_tile(merged_OI, weight_OI, operands[name], start))
            on_bytes(merged_OI.numel() * merged_OI.itemsize)
    return {
        job.plan.request.id: _summarize(tensor.name, sums[job.plan.request.id], tensor.name in job.plan.deltas)
        for job in jobs
    }


@dataclass(frozen=True, slots=True)
class _Operands:
    """The delta of one weight: lora_A [R, I], scaling times lora_B [O, R], the largest norm of a column of lora_A."""

    a_RI: torch.Tensor
    scaled_b_OR: torch.Tensor
    max_column_norm: float


def _operands(plan: MergePlan, name: str) -> _Operands | None:
    delta = plan.deltas.get(name)
    if delta is None:
        return None
    precision = precision_for(plan.base.by_name[name].dtype)
    a_RI = read_operand(plan.opened, delta.a_RI).to(precision)
    # Unlike the merge, the scaling goes into B in float64 first: the two must not share a slip.
    scaled_b_OR = (read_operand(plan.opened, delta.b_OR).double() * delta.scaling).to(precision)
    return _Operands(a_RI, scaled_b_OR, float(torch.linalg.vector_norm(a_RI, dim=0).max()))


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def _read_weight(
    base: BasePlan, tensor: OutputTensor, weight: QuantizedWeight | None, start: int, stop: int
) -> torch.Tensor:
    if weight is not None:
        return weight.dequantize_rows(start, stop).cpu()
    assert tensor.stored is not None
    return _as_matrix(read_rows(base.source.directory / tensor.shard, tensor.stored, start, stop))


def _check_tile(merged_OI: torch.Tensor, weight_OI: torch.Tensor, operands: _Operands | None, start: int) -> _Sums:
    dtype = merged_OI.dtype
    if operands is None and weight_OI.dtype == dtype:
        return _check_equal(merged_OI, weight_OI)
    precision = precision_for(dtype)
    exact_weight_OI = weight_OI.to(precision)
    change_OI = merged_OI.to(precision).sub_(exact_weight_OI)
    sums = _Sums(weight_square=float(torch.dot(exact_weight_OI.view(-1), exact_weight_OI.view(-1))))
    bound_OI = half_ulp(merged_OI).to(precision)
    if operands is not None:
        scaled_b_OR = operands.scaled_b_OR[start : start + merged_OI.shape[0]]
        delta_OI = torch.mm(scaled_b_OR, operands.a_RI)
        sums.delta_square = float(torch.dot(delta_OI.view(-1), delta_OI.view(-1)))
        sums.kept = float(torch.dot(change_OI.view(-1), delta_OI.view(-1)))
        # A sum of R products in float32, here and in the merge, errs by at most about R + 3 roundings of the terms
        # (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); |b . a| is bounded by the norms.
        num_roundings = operands.a_RI.shape[0] + 3
        slack_O = torch.linalg.vector_norm(scaled_b_OR, dim=1) * operands.max_column_norm
        if precision is torch.float32:
            # W + delta is rounded to float32 before it is rounded to the output's dtype: by at most 2**-23 of the power
            # of two below the value, of which half a unit in the last place is 2**-(mantissa bits + 1).
            bound_OI *= 1 + 2.0 ** (MANTISSA_BITS[dtype] - 22)
        bound_OI += (2 * num_roundings * torch.finfo(torch.float32).eps * slack_O).unsqueeze(1)
        change_OI -= delta_OI
    error_OI = change_OI.abs_()
    sums.max_abs_error = _largest(error_OI)
    excess_OI = error_OI.div_(bound_OI)
    sums.rounding_excess = _largest(excess_OI)
    if sums.rounding_excess > 1:
        # NaN compares false with everything, so what is not within the bound is counted, not what is beyond it.
        sums.num_bad_elements = excess_OI.numel() - int((excess_OI <= 1).sum())
    return sums


def _check_equal(merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> _Sums:
    left, right = merged_OI.view(BITS[merged_OI.itemsize]), weight_OI.view(BITS[weight_OI.itemsize])
    sums = _Sums()
    if weight_OI.is_floating_point():
        sums.weight_square = float(torch.linalg.vector_norm(weight_OI.float())) ** 2
    if torch.equal(left, right):
        return sums
    different = left != right
    error = (merged_OI.double() - weight_OI.double()).abs()[different]
    sums.num_bad_elements = int(different.sum())
    sums.max_abs_error = _largest(error)
    allowed = half_ulp(weight_OI[different]) if weight_OI.dtype in EXPONENT_BITS else 0.5
    sums.rounding_excess = _largest(error / allowed)
    return sums


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
