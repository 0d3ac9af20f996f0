"""What quantizing leaves of a delta, and what a report says of the parts that a weight is stored as."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Self

import torch

from jobs.parity_report import TensorCheck
from workers.bases.forms import StoredParts, StoredWeight
from workers.merging.checks.tally import finite
from workers.numerics.kernels.elements import array
from workers.numerics.kernels.remains import remains
from workers.numerics.tiles import TileBuffers, Tiling, columns_of

_STEP_ELEMENTS = 1 << 20
"""Of a weight, dequantized and compared at once."""


class Remains(NamedTuple):
    """What is left of a change to some elements of a weight, once their sums have been rounded to few bits."""

    error_square: float = 0.0
    """|error|^2, where the error is what ships less what was merged."""
    error_delta: float = 0.0
    """<error, delta>."""
    delta_square: float = 0.0

    @classmethod
    def total(cls, parts: Iterable["Remains"]) -> Self:
        """Add up those of several parts, in their order."""
        found = cls()
        for part in parts:
            found = cls(*(left + right for left, right in zip(found, part, strict=True)))
        return found

    @property
    def survival(self) -> float | None:
        """How much of the delta is left: <shipped - W, delta> / |delta|^2; None where there is none."""
        kept = self.error_delta + self.delta_square  # shipped - W is what was added and the error
        return kept / self.delta_square if self.delta_square > 0 and math.isfinite(kept) else None


def remains_of(
    ships: StoredWeight,
    merged_OI: torch.Tensor,
    before: Callable[[slice], torch.Tensor] | None,
    alignment: int,
    buffers: TileBuffers,
) -> Remains:
    """Measure what is left of the delta of a weight, or of some of its rows.

    Args:
        ships: what its codes stand for.
        merged_OI: what was quantized, as a matrix.
        before: returns rows of W; None where nothing was added to it.
        alignment: rows of W are asked for in multiples of this.
        buffers: memory of the calling thread.
    """
    num_columns = columns_of(ships.shape)
    found = []
    for rows in Tiling.of(ships.shape, math.lcm(ships.row_alignment, alignment), _STEP_ELEMENTS).rows:
        is_to_be = merged_OI[rows]
        memory = buffers.get("ships", ships.dtype, (len(is_to_be), num_columns), host=True)
        tile = ships.dequantize_rows(rows.start, rows.stop, memory)
        was = is_to_be[:0] if before is None else before(rows)
        found.append(Remains(*remains(array(tile), array(is_to_be), array(was))))
    return Remains.total(found)


def checks_of_parts(
    parts: StoredParts, proven: TensorCheck, left: Remains, changed: Mapping[str, bool]
) -> list[TensorCheck]:
    """Return what a report says of the parts of a weight that was quantized: all of it with the codes.

    Args:
        parts: what it is stored as.
        proven: what was found about its merged numbers.
        left: of its delta.
        changed: whether a part is another one than in the base, by stored name.
    """
    of_codes = {
        "tensor": parts.codes,
        "changed": any(changed.values()),
        "requantization_error": math.sqrt(finite(left.error_square)),
        "survival": left.survival,
    }
    beside = [
        TensorCheck(
            tensor=stored, changed=changed[stored], targeted=proven.targeted, max_abs_error=0.0, rounding_excess=0.0
        )
        for stored in parts.beside.values()
    ]
    return [proven.model_copy(update=of_codes), *beside]
