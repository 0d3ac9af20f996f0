"""B @ A on the CPU, in pieces: added to a weight, compared with what was added, or both while it is in the caches.

Shape suffixes: O output features, I input features, R rank, C chunks of the columns.
"""

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from workers.numerics.kernels import merging
from workers.numerics.kernels.blas import sgemm_address
from workers.numerics.kernels.elements import ARRAY_DTYPES, array
from workers.numerics.tiles import TileBuffers, strips_of

_NUM_PLACES = 1 << 17
"""Elements of a tile whose places are kept; where more are in doubt, it is all of them."""
_NO_PLACES = np.empty(0, np.int64)


@dataclass(slots=True)
class Comparison:
    """Rows of W, read once more, that sums are compared with, and what is found."""

    weight_OI: torch.Tensor
    scaling: float
    """What products are multiplied by; the caller has a scaling of its own."""
    factors_I: np.ndarray
    """Of the dtype of the product: what its columns are multiplied by in the projections."""
    projections_OC: np.ndarray
    """Of the dtype of the product: its sums over chunks of `merging.CHUNK` columns, each times its factor."""
    places: np.ndarray = field(default_factory=lambda: np.empty(_NUM_PLACES, np.int64))
    """Those of elements that are not W + delta rounded to nearest, as far as there is room."""
    num_different: int = 0
    """How many such elements there are."""
    weight_square: float = 0.0
    delta_square: float = 0.0
    error_delta: float = 0.0
    """<merged - (W + delta), delta>."""
    max_abs_error: float = 0.0
    """NaN where one is."""

    @classmethod
    def of(cls, weight_OI: torch.Tensor, factors_I: np.ndarray, scaling: float) -> Self:
        """Begin a comparison with rows of W."""
        num_rows, num_columns = weight_OI.shape
        shape = num_rows, math.ceil(num_columns / merging.CHUNK)
        return cls(weight_OI, scaling, factors_I, np.full(shape, np.nan, factors_I.dtype))

    @property
    def doubtful(self) -> torch.Tensor | None:
        """The places, counted from the first row, of elements that may be wrong; None if it may be any."""
        if not math.isfinite(self.max_abs_error) or self.num_different > len(self.places):
            return None  # infinity equals itself, and is as wrong as NaN
        return torch.from_numpy(self.places[: self.num_different])

    def known(self, rows: slice) -> merging.Known:
        """Return what some rows are compared with."""
        return merging.Known(
            weight=array(lifted(self.weight_OI[rows])),
            scaling=self.factors_I.dtype.type(self.scaling),
            factors=self.factors_I,
            projections=self.projections_OC[rows].reshape(-1),
            places=self.places[self.num_different :],
        )

    def add(self, rows: slice, found: tuple[float, float, float, float, int]) -> None:
        """Add what `merging.merge` found in some of the rows."""
        weight_square, delta_square, error_delta, max_abs_error, num_different = found
        first = rows.start * self.weight_OI.shape[1]
        self.places[self.num_different : self.num_different + num_different] += first
        self.num_different += num_different
        self.weight_square += weight_square
        self.delta_square += delta_square
        self.error_delta += error_delta
        self.max_abs_error = float(np.maximum(self.max_abs_error, max_abs_error))  # NaN stays NaN


def lifted(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return a weight as something that compiled loops take: itself, or in float32."""
    return weight_OI if weight_OI.dtype in ARRAY_DTYPES else weight_OI.float()


def merge(
    b_OR: torch.Tensor,
    a_RI: torch.Tensor,
    scaling: float,
    merged_OI: torch.Tensor,
    buffers: TileBuffers,
    *,
    weight_OI: torch.Tensor | None = None,
    comparison: Comparison | None = None,
) -> bool:
    """Add scaling * B @ A to rows of W and round the sums once, or compare such sums with what they should be, or both.

    The order of operations, and with it every bit, is that of PEFT: the product in float32, times the scaling, plus W.

    Args:
        b_OR: rows of lora_B, contiguous; float32, or float64 for a comparison of float32.
        a_RI: lora_A, contiguous, of that dtype.
        scaling: of the product.
        merged_OI: bfloat16, float16 or float32: gets the sums, or has them if nothing is added.
        buffers: scratch of this thread.
        weight_OI: the rows of W that it is added to, of any dtype, or `merged_OI` itself, which holds them until then;
            None if nothing is added.
        comparison: what the sums are compared with; None if they are not.

    Returns:
        Whether all sums are finite in the dtype they are rounded to.
    """
    num_rows, num_columns = merged_OI.shape
    strips = tuple(strips_of(num_rows, num_columns))
    product_OI = buffers.get("product", b_OR.dtype, (strips[0].stop, num_columns), host=True)
    scale = array(product_OI).dtype.type(scaling)
    # Of a single element torch takes the product by another routine.
    sgemm = sgemm_address() if b_OR.dtype is torch.float32 and merged_OI.numel() > 1 else 0
    weights = (weight_OI, None if comparison is None else comparison.weight_OI)
    in_place = weight_OI is merged_OI and merged_OI.dtype in ARRAY_DTYPES
    # Each call from here, into torch or into what is compiled, hands the interpreter's lock to another thread.
    at_once = sgemm and all(weight is None or weight.dtype in ARRAY_DTYPES for weight in weights)
    is_finite = True
    for rows in (slice(0, num_rows),) if at_once else strips:
        product = product_OI
        if not sgemm:
            product = product_OI[: rows.stop - rows.start]
            torch.mm(b_OR[rows], a_RI, out=product)
        merged = array(merged_OI[rows])
        nothing = merged[:0]
        known = merging.Known(nothing, scale, scale[None], scale[None], _NO_PLACES)
        if comparison is not None:
            known = comparison.known(rows)
        are_finite, *found = merging.merge(
            merging.Product(sgemm, array(b_OR[rows]), array(a_RI), num_columns, array(product)),
            merging.Sums(
                scaling=scale,
                weight=nothing if weight_OI is None or in_place else array(lifted(weight_OI[rows])),
                in_place=in_place,
                merged=merged,
            ),
            known,
        )
        is_finite &= are_finite
        if comparison is not None:
            comparison.add(rows, found)
    return is_finite
