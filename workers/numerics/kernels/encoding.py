"""Weights made 8-bit codes whose scales are shared by blocks: what scales come from, and the codes."""

from typing import Any, NamedTuple

import numpy as np

from workers.numerics.kernels.compiled import Kernel
from workers.numerics.kernels.elements import lift, lower, of_ordered_bits, ordered_bits, place

_AT_ONCE = 256


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


@Kernel
def encode(weight: Any, scaling: Any, codes_of: Any, layout: Any, codes: Any) -> None:
    """Turn rows of a weight into codes: it is scaled, and what comes of that is looked up.

    Args:
        weight: elements, flat.
        scaling: a `Scaling`.
        codes_of: uint8 [65,536]: the code of every number of 16 bits, by its bits. Where `rounded` is float32, of
            every bfloat16: an odd one tells the code of all that lies between its neighbours.
        layout: columns of the weight, rows and columns of a block. The last blocks may be cut short.
        codes: uint8, gets one for each element, flat.
    """
    num_columns, block_rows, block_columns = layout
    num_rows = codes.size // num_columns
    num_across = (num_columns + block_columns - 1) // block_columns
    shifts, rounded = scaling.shifts, scaling.rounded
    places = np.empty(_AT_ONCE, np.uint16)
    for row in range(num_rows):
        for across in range(num_across):
            block = row // block_rows * num_across + across
            scale = scaling.scales[block]
            stop = min((across + 1) * block_columns, num_columns)
            for begin in range(across * block_columns, stop, _AT_ONCE):
                end = min(begin + _AT_ONCE, stop)
                source = weight[row * num_columns + begin : row * num_columns + end]
                target = codes[row * num_columns + begin : row * num_columns + end]
                # Many are scaled and rounded at once, then looked up.
                if shifts.size:
                    shift = shifts[block]
                    for i in range(source.size):
                        quotient = lower(np.float32(np.float32(lift(source[i])) / scale), rounded)
                        places[i] = place(lower(np.float32(np.float32(lift(quotient)) + shift), rounded))
                elif scaling.multiplies:
                    for i in range(source.size):
                        places[i] = place(lower(np.float32(np.float32(lift(source[i])) * scale), rounded))
                else:
                    for i in range(source.size):
                        places[i] = place(lower(np.float32(np.float32(lift(source[i])) / scale), rounded))
                for i in range(target.size):
                    target[i] = codes_of[places[i]]
