"""What one rounding does: half a unit in the last place, and the bits of a value."""

import torch

EXPONENT_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_LARGEST_POWER = {torch.bfloat16: 2.0**127, torch.float16: 2.0**15, torch.float32: 2.0**127}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the same size, by size in bytes."""


def precision_for(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of another dtype are compared: float64 for float32, float32 for 16 bits."""
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def half_ulp(values: torch.Tensor) -> torch.Tensor:
    """Return half a unit in the last place of each value, in the values' own dtype where it can be held.

    The exponent alone, without the mantissa's bits, is the power of two below the value: one unit in the last place is
    that, shifted by the length of the mantissa.
    """
    bits = BITS[values.itemsize]
    powers = values.view(bits).bitwise_and(EXPONENT_BITS[values.dtype]).view(values.dtype)
    smallest = torch.finfo(values.dtype).smallest_normal
    wide = powers.to(precision_for(values.dtype)).clamp_(smallest, _LARGEST_POWER[values.dtype])
    return wide.mul_(2.0 ** -(MANTISSA_BITS[values.dtype] + 1))
