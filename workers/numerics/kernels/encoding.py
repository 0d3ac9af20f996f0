"""Weights made 8-bit codes whose scales are shared by blocks: what scales come from, and the codes."""

from typing import Any, NamedTuple

import numpy as np

from workers.numerics.kernels.compiled import Kernel, jit
from workers.numerics.kernels.elements import lift, lower, of_ordered_bits, ordered_bits, place

_AT_ONCE = 1024


@Kernel
def extremes(weight: Any, num_columns: Any, block_columns: Any, lowest: Any, highest: Any) -> None:
    """Find the smallest and the largest of each group of a row; NaN where there is one.

    Args:
        weight: elements of whole rows, flat.
        num_columns: of a row.
        block_columns: of a group; the last one may be cut short.
        lowest: float32, gets the smallest of each group of each row, flat.
        highest: float32, gets the largest.
    """
    num_across = (num_columns + block_columns - 1) // block_columns
    for group in range(lowest.size):
        begin = group % num_across * block_columns
        row = group // num_across * num_columns
        w = weight[row + begin : row + min(begin + block_columns, num_columns)]
        low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(w.size):
            bits = ordered_bits(np.float32(lift(w[i])))
            low, high = min(low, bits), max(high, bits)
        lowest[group], highest[group] = of_ordered_bits(low), of_ordered_bits(high)


class Scaling(NamedTuple):
    """What is done to the elements of a weight before they are looked up."""

    scales: np.ndarray
    """float32, of all blocks that the rows are in, flat."""
    multiplies: bool
    """Whether scales are multiplied by, and not divided by."""
    shifts: np.ndarray
    """float32, what is added to quotients, one for each scale; empty for nothing."""
    rounded: np.ndarray
    """One element of the dtype that quotients or products are rounded to, and then the sums."""


@jit
def _spread(of_blocks: Any, begin: Any, end: Any, block_columns: Any, spread: Any) -> None:
    """Write down what columns from `begin` to `end` of a row have, from what its blocks have."""
    at = begin
    while at < end:
        block = at // block_columns
        stop = min((block + 1) * block_columns, end)
        value, part = of_blocks[block], spread[at - begin : stop - begin]
        for i in range(part.size):
            part[i] = value
        at = stop


@jit
def _scale(source: Any, scales: Any, shifts: Any, scaling: Any, places: Any) -> None:
    rounded = scaling.rounded
    if scaling.shifts.size:
        for i in range(source.size):
            quotient = lower(np.float32(np.float32(lift(source[i])) / scales[i]), rounded)
            places[i] = place(lower(np.float32(np.float32(lift(quotient)) + shifts[i]), rounded))
    elif scaling.multiplies:
        for i in range(source.size):
            places[i] = place(lower(np.float32(np.float32(lift(source[i])) * scales[i]), rounded))
    else:
        for i in range(source.size):
            places[i] = place(lower(np.float32(np.float32(lift(source[i])) / scales[i]), rounded))


@jit
def _look_up(places: Any, codes_of: Any, codes: Any) -> None:
    for i in range(codes.size):
        codes[i] = codes_of[places[i]]


@jit
def _look_up_two(places: Any, codes_of: Any, codes: Any) -> None:
    for i in range(codes.size):
        codes[i] = codes_of[places[2 * i]] | np.uint8(codes_of[places[2 * i + 1]] << np.uint8(4))


@Kernel
def encode(weight: Any, scaling: Any, codes_of: Any, layout: Any, codes: Any) -> None:
    """Turn rows of a weight into codes: it is scaled, and what comes of that is looked up.

    Args:
        weight: elements, flat.
        scaling: a `Scaling`.
        codes_of: uint8 [65,536]: the code of every number of 16 bits, by its bits. Where `rounded` is float32, of
            every bfloat16: an odd one tells the code of all that lies between its neighbours.
        layout: columns of the weight, rows and columns of a block. The last blocks may be cut short.
        codes: uint8, gets one for each element, flat; or half as many, each with two of 4 bits, the first in the lower
            half, where rows have an even number of columns.
    """
    num_columns, block_rows, block_columns = layout
    num_rows = weight.size // num_columns
    holds_two = 2 * codes.size == weight.size
    num_across = (num_columns + block_columns - 1) // block_columns
    places, scales, shifts = (
        np.empty(_AT_ONCE, np.uint16),
        np.empty(_AT_ONCE, np.float32),
        np.empty(_AT_ONCE, np.float32),
    )
    for row in range(num_rows):
        of_row = slice(row // block_rows * num_across, (row // block_rows + 1) * num_across)
        for begin in range(0, num_columns, _AT_ONCE):
            end = min(begin + _AT_ONCE, num_columns)
            _spread(scaling.scales[of_row], begin, end, block_columns, scales)
            if scaling.shifts.size:
                _spread(scaling.shifts[of_row], begin, end, block_columns, shifts)
            at = row * num_columns + begin
            size = end - begin
            # Many are scaled and rounded at once, then looked up.
            _scale(weight[at : at + size], scales, shifts, scaling, places)
            if holds_two:
                _look_up_two(places, codes_of, codes[at // 2 : (at + size) // 2])
            else:
                _look_up(places, codes_of, codes[at : at + size])
