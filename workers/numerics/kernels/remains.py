"""What is left of a change, once its sum has been rounded to few bits."""

from typing import Any

import numpy as np

from workers.numerics.kernels.compiled import Kernel
from workers.numerics.kernels.elements import lift, with_product
from workers.numerics.kernels.merging import CHUNK


@Kernel
def remains(shipped: Any, merged: Any, before: Any) -> Any:
    """Compare what ships with what was merged, and with what there was before.

    Differences are taken in float32, and their products added up in it over `CHUNK` elements, beyond that in float64.

    Args:
        shipped: elements, as their codes stand for them.
        merged: elements, those that were quantized.
        before: elements of W; empty if nothing was added to it.

    Returns:
        |error|^2, <error, delta> and |delta|^2. The error is shipped - merged, and the delta merged - W; without W the
        last two are 0.
    """
    error_square, error_delta, delta_square = 0.0, 0.0, 0.0
    for begin in range(0, merged.size, CHUNK):
        s, m = shipped[begin : begin + CHUNK], merged[begin : begin + CHUNK]
        e_square, e_d, d_square = np.float32(0), np.float32(0), np.float32(0)
        if before.size:
            w = before[begin : begin + CHUNK]
            for i in range(m.size):
                number = np.float32(lift(m[i]))
                error = np.float32(np.float32(lift(s[i])) - number)
                delta = np.float32(number - np.float32(lift(w[i])))
                e_square = with_product(e_square, error, error)
                e_d = with_product(e_d, error, delta)
                d_square = with_product(d_square, delta, delta)
        else:
            for i in range(m.size):
                error = np.float32(np.float32(lift(s[i])) - np.float32(lift(m[i])))
                e_square = with_product(e_square, error, error)
        error_square += float(e_square)
        error_delta += float(e_d)
        delta_square += float(d_square)
    return error_square, error_delta, delta_square
