"""Merged rows held against what they should be: bit for bit, or within one rounding of the exact sum."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from jobs.parity_report import TensorCheck
from workers.merging.checks.proof import SPARSE, Operands
from workers.merging.checks.tally import Sums, finite
from workers.numerics import products
from workers.numerics.kernels import merging
from workers.numerics.kernels.elements import ARRAY_DTYPES, array
from workers.numerics.products import lifted
from workers.numerics.rounding import BITS, EXPONENT_BITS, MANTISSA_BITS, half_ulp
from workers.numerics.tiles import rows_per_tile, strips_of

_JUDGED_ELEMENTS = 1 << 16
"""Elements that are held against the exact sum at the same time."""


def judge(found: products.Comparison, merged_OI: torch.Tensor, operands: Operands | None, rows: slice) -> Sums:
    """Return what a comparison comes to, once elements in doubt are held against the exact sum."""
    sums = Sums(
        max_abs_error=finite(found.max_abs_error),
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


def differs(merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether some element is not W; a few rows at a time, as the first ones tell where anything was added."""
    return any(
        not torch.equal(_bits(merged_OI[rows]), _bits(weight_OI[rows].to(merged_OI.dtype)))
        for rows in strips_of(*weight_OI.shape)
    )


def check_equal(merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> Sums:
    """Check rows that are to be W, bit for bit."""
    sums = Sums()
    if weight_OI.dtype in ARRAY_DTYPES:
        sums.weight_square, is_equal = merging.compare_unchanged(array(weight_OI), array(merged_OI))
        if is_equal:
            return sums
    for part in strips_of(*weight_OI.shape):
        sums.add(_differences(merged_OI[part], weight_OI[part]))
    return sums


def _differences(merged_OI: torch.Tensor, weight_OI: torch.Tensor) -> Sums:
    sums = Sums()
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
    return finite(float(values.amax()) if values.numel() else 0.0)


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
