"""Adding B @ A and rounding, and comparing what was added and rounded."""

import functools
from typing import Any, NamedTuple

import numpy as np

from workers.numerics.kernels.blas import multiply
from workers.numerics.kernels.compiled import Kernel, jit
from workers.numerics.kernels.elements import (
    different_bits,
    lift,
    lower,
    lower_number,
    magnitude_bits,
    of_bits,
    off_nearest,
    with_product,
)

_ZERO: Any = np.float32(0)
CHUNK = 256
"""Elements whose squares are added up in the precision of their products."""


# Inlined so that an array given twice is seen to be one: then no sum goes where another W is still to be read.
@functools.partial(jit, inline="always")
def _add(weight: Any, product: Any, scaling: Any, rounded: Any) -> Any:
    """Round W + scaling * product once, beside W or in its place; return whether all sums are finite."""
    largest = np.uint32(0)
    for i in range(weight.size):
        total = np.float32(np.float32(product[i] * scaling) + lift(weight[i]))
        largest = max(largest, magnitude_bits(total))
        rounded[i] = lower_number(total, rounded)
    return np.isfinite(lift(lower(of_bits(largest), rounded)))


@jit
def _compare(  # noqa: PLR0917 - compiled code passes by position
    weight: Any, merged: Any, product: Any, scaling: Any, factors: Any, projections: Any, places: Any
) -> Any:
    """Compare merged elements with W + scaling * product, added and rounded anew; return what `merge` does of it."""
    precision = product.dtype.type
    weight_square, delta_square, error_delta, num_different = 0.0, 0.0, 0.0, 0
    largest = magnitude_bits(precision(0))
    num_columns = factors.size
    num_chunks = (num_columns + CHUNK - 1) // CHUNK
    for number in range(projections.size):
        begin = number % num_chunks * CHUNK
        row = number // num_chunks * num_columns
        first, last = row + begin, row + min(begin + CHUNK, num_columns)
        w, m, p, factor = weight[first:last], merged[first:last], product[first:last], factors[begin:]
        w_square, d_square, e_d, projected = precision(0), precision(0), precision(0), precision(0)
        different = np.uint32(0)
        for i in range(w.size):
            element, lifted = lift(m[i]), precision(lift(w[i]))
            delta = precision(p[i] * scaling)
            total = lifted + delta
            different = np.uint32(different | off_nearest(total, m[i]))
            error = element - total
            bits = magnitude_bits(error)
            largest = max(largest, bits)
            w_square = with_product(w_square, lifted, lifted)
            d_square = with_product(d_square, delta, delta)
            e_d = with_product(e_d, error, delta)
            projected = with_product(projected, p[i], factor[i])
        weight_square += w_square
        delta_square += d_square
        error_delta += e_d
        projections[number] = projected
        if different:
            for i in range(w.size):
                if lower(precision(lift(w[i])) + precision(p[i] * scaling), merged) != m[i]:
                    if num_different < places.size:
                        places[num_different] = first + i
                    num_different += 1
    return weight_square, delta_square, error_delta, largest, num_different


class Product(NamedTuple):
    """What B @ A of some rows comes from."""

    sgemm: int
    """Address of the SGEMM that multiplies; 0 if `values` already holds the product of all rows."""
    b: np.ndarray
    """float32, rows of B; anything where it is not multiplied."""
    a: np.ndarray
    """float32, A; anything where it is not multiplied."""
    num_columns: int
    """Of W."""
    values: np.ndarray
    """Gets B @ A of the rows of a piece; float32, or float64 for a comparison of float32."""


class Sums(NamedTuple):
    """What the product is added to."""

    scaling: np.floating
    """Multiplied into the product; of its dtype."""
    weight: np.ndarray
    """Elements of W; empty if nothing is added to them."""
    in_place: bool
    """Whether it is added to what is in `merged`."""
    merged: np.ndarray
    """Elements of the sums, rounded: gets them, or has them if nothing is added."""


class Known(NamedTuple):
    """What the sums are compared with."""

    weight: np.ndarray
    """Elements of W, read once more; empty if nothing is compared."""
    scaling: np.floating
    """What the product is multiplied by in the comparison; of its dtype."""
    factors: np.ndarray
    """Of the dtype of the product, one for each column."""
    projections: np.ndarray
    """Of the dtype of the product: gets the sums of the product times the factors, over each row and its chunks of
    `CHUNK` columns."""
    places: np.ndarray
    """int64, gets the places of elements that are not the sum rounded to nearest, as far as there is room."""


@Kernel
def merge(product: Any, sums: Any, known: Any) -> Any:
    """Add scaling * B @ A to rows of W and round the sums once, or compare such sums with what they should be, or both.

    It goes through the rows in pieces, as many at once as `product.values` has room for, so that what is compared is
    still in the caches.

    Args:
        product: a `Product`.
        sums: `Sums`.
        known: a `Known`.

    Returns:
        Whether all sums are finite. Then, of what was compared: the squared norms of W and of the delta,
        <error, delta>, the largest |error| (NaN where one is), and how many elements are not the rounded sum. The error
        is merged - (W + delta).
    """
    is_finite = True
    weight_square, delta_square, error_delta, num_different = 0.0, 0.0, 0.0, 0
    values, merged, num_columns = product.values, sums.merged, product.num_columns
    largest = magnitude_bits(values.dtype.type(0))
    num_rows = merged.size // num_columns
    num_chunks = (num_columns + CHUNK - 1) // CHUNK
    for row in range(0, num_rows, values.size // num_columns):
        count = min(values.size // num_columns, num_rows - row)
        first, last = row * num_columns, (row + count) * num_columns
        delta = values[: last - first]
        if product.sgemm:
            num_inner = product.a.size // num_columns
            multiply(product.sgemm, product.b[row * num_inner :], product.a, delta, count, num_inner, num_columns)
        if sums.in_place:
            piece = merged[first:last]
            is_finite &= _add(piece, delta, sums.scaling, piece)
        elif sums.weight.size:
            is_finite &= _add(sums.weight[first:last], delta, sums.scaling, merged[first:last])
        if known.weight.size:
            weight_part, delta_part, error_part, largest_part, num_different_part = _compare(
                known.weight[first:last],
                merged[first:last],
                delta,
                known.scaling,
                known.factors,
                known.projections[row * num_chunks : (row + count) * num_chunks],
                known.places[min(num_different, known.places.size) :],
            )
            known.places[num_different : num_different + num_different_part] += first
            weight_square += weight_part
            delta_square += delta_part
            error_delta += error_part
            largest = max(largest, largest_part)
            num_different += num_different_part
    return is_finite, weight_square, delta_square, error_delta, of_bits(largest), num_different


@Kernel
def proves(b: Any, projected: Any, projections: Any, allowance: Any) -> Any:
    """Return whether projections of rows are those of B @ A, as far as rounding lets them.

    Args:
        b: float32, rows of B, one after the other.
        projected: float64, the projections of the rows of A.
        projections: float32 or float64, those of the product, one row of them for each row of B.
        allowance: how far they may be off, for a row of B of length one.
    """
    num_inner = projected.shape[0]
    expected = np.empty(projected.shape[1])
    for row in range(b.size // num_inner):
        square = 0.0
        expected[:] = 0.0
        for r in range(num_inner):
            factor = np.float64(b[row * num_inner + r])
            square += factor * factor
            for c in range(expected.size):
                expected[c] += factor * projected[r, c]
        allowed = allowance * np.sqrt(square)
        for c in range(expected.size):
            if not abs(expected[c] - projections[row, c]) <= allowed:
                return False
    return True


@Kernel
def compare_unchanged(weight: Any, merged: Any) -> Any:
    """Compare merged elements with those of a weight that is to be as it was.

    Args:
        weight: elements of W.
        merged: as many, of the same dtype.

    Returns:
        The squared norm of W, and whether all elements have the same bits.
    """
    weight_square = 0.0
    different = np.uint32(0)
    for begin in range(0, weight.size, CHUNK):
        w, m = weight[begin : begin + CHUNK], merged[begin : begin + CHUNK]
        w_square = _ZERO
        for i in range(w.size):
            lifted = lift(w[i])
            different = np.uint32(different | different_bits(w[i], m[i]))
            w_square = with_product(w_square, lifted, lifted)
        weight_square += w_square
    return weight_square, different == 0


@Kernel
def square_difference(left: Any, right: Any) -> Any:
    """Return the squared norm of the difference of two weights."""
    total = 0.0
    for begin in range(0, left.size, CHUNK):
        a, b = left[begin : begin + CHUNK], right[begin : begin + CHUNK]
        part = _ZERO
        for i in range(a.size):
            difference = np.float32(lift(a[i]) - lift(b[i]))
            part = with_product(part, difference, difference)
        total += part
    return total
