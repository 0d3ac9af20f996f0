"""Adding and rounding, and comparing what was added and rounded."""

from typing import Any

import numpy as np

from workers.kernels.compiled import Kernel
from workers.kernels.elements import (
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
_CHUNK = 1024
"""Elements whose squares are added up in the precision of their products."""


@Kernel
def add_delta(weight: Any, delta: Any, scaling: Any, rounded: Any) -> Any:
    """Add a scaled delta to a weight and round it once.

    Args:
        weight: elements of W.
        delta: float32, as many.
        scaling: float32; multiplied into the delta first.
        rounded: gets the sums.

    Returns:
        Whether all of them are finite.
    """
    largest = np.uint32(0)
    for i in range(weight.size):
        total = np.float32(np.float32(delta[i] * scaling) + lift(weight[i]))
        bits = magnitude_bits(total)
        largest = max(largest, bits)
        rounded[i] = lower_number(total, rounded)
    return np.isfinite(lift(lower(of_bits(largest), rounded)))


@Kernel
def compare(weight: Any, merged: Any, delta: Any, places: Any) -> Any:
    """Compare merged elements with W + delta, computed and rounded anew.

    Args:
        weight: elements of W.
        merged: elements of what was merged, as many.
        delta: what should have been added, float32 or float64: the precision of the comparison.
        places: int64, gets the places of elements that are not the sum rounded to nearest, as far as there is room.

    Returns:
        The squared norms of W and of the delta, <error, delta>, the largest |error| (NaN where one is), and how many
        elements are not the rounded sum. The error is merged - (W + delta).
    """
    precision = delta.dtype.type
    weight_square, delta_square, error_delta, num_different = 0.0, 0.0, 0.0, 0
    largest = magnitude_bits(precision(0))
    for begin in range(0, weight.size, _CHUNK):
        w, m, d = weight[begin : begin + _CHUNK], merged[begin : begin + _CHUNK], delta[begin : begin + _CHUNK]
        w_square, d_square, e_d = precision(0), precision(0), precision(0)
        different = np.uint32(0)
        for i in range(w.size):
            element, lifted = lift(m[i]), precision(lift(w[i]))
            total = lifted + d[i]
            different = np.uint32(different | off_nearest(total, m[i]))
            error = element - total
            bits = magnitude_bits(error)
            largest = max(largest, bits)
            w_square = with_product(w_square, lifted, lifted)
            d_square = with_product(d_square, d[i], d[i])
            e_d = with_product(e_d, error, d[i])
        weight_square += w_square
        delta_square += d_square
        error_delta += e_d
        if different:
            for i in range(w.size):
                if lower(precision(lift(w[i])) + d[i], merged) != m[i]:
                    if num_different < places.size:
                        places[num_different] = begin + i
                    num_different += 1
    return weight_square, delta_square, error_delta, of_bits(largest), num_different


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
    for begin in range(0, weight.size, _CHUNK):
        w, m = weight[begin : begin + _CHUNK], merged[begin : begin + _CHUNK]
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
    for begin in range(0, left.size, _CHUNK):
        a, b = left[begin : begin + _CHUNK], right[begin : begin + _CHUNK]
        part = _ZERO
        for i in range(a.size):
            difference = np.float32(lift(a[i]) - lift(b[i]))
            part = with_product(part, difference, difference)
        total += part
    return total
