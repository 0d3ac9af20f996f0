"""Bits in which two tensors differ."""

from typing import Any

import torch

from workers.numerics.kernels.compiled import Kernel
from workers.numerics.rounding import BITS


def num_different(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return how many elements of two CPU tensors have other bits; all, where their dtypes or shapes differ."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return max(one.numel(), other.numel(), 1)
    left, right = (tensor.reshape(-1).view(BITS[one.dtype.itemsize]).numpy() for tensor in (one, other))
    return int(_count(left, right))


@Kernel
def _count(left: Any, right: Any) -> Any:
    """Count elements that differ: of integers, as the compiler makes short loops of no others."""
    number = 0
    for i in range(left.size):
        number += left[i] != right[i]
    return number
