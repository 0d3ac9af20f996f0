"""8-bit codes whose scales are shared by blocks of a weight."""

from typing import Any

import numpy as np

from workers.numerics.kernels.compiled import Kernel
from workers.numerics.kernels.elements import lower

_AT_ONCE = 256


@Kernel
def dequantize(codes: Any, scales: Any, values: Any, layout: Any, weight: Any) -> None:
    """Turn rows of codes into rows of a weight: value times scale in float32, rounded once.

    Args:
        codes: uint8 [rows, columns], flat.
        scales: float32, of all blocks that these rows are in, flat.
        values: float32 [256]: what each code stands for.
        layout: columns of the weight, rows and columns of a block, and where in its block the first row is. The last
            blocks may be cut short.
        weight: gets the elements, flat.
    """
    num_columns, block_rows, block_columns, first_row = layout
    num_rows = codes.size // num_columns
    num_across = (num_columns + block_columns - 1) // block_columns
    looked_up = np.empty(_AT_ONCE, np.float32)
    for row in range(num_rows):
        of_row = (first_row + row) // block_rows * num_across
        for across in range(num_across):
            scale = scales[of_row + across]
            stop = min((across + 1) * block_columns, num_columns)
            for begin in range(across * block_columns, stop, _AT_ONCE):
                source = codes[row * num_columns + begin : row * num_columns + min(begin + _AT_ONCE, stop)]
                target = weight[row * num_columns + begin : row * num_columns + min(begin + _AT_ONCE, stop)]
                # Looked up first, and then many are multiplied and rounded at once.
                for i in range(source.size):
                    looked_up[i] = values[source[i]]
                for i in range(target.size):
                    target[i] = lower(np.float32(looked_up[i] * scale), weight)
