"""Inner loops on the CPU, compiled by Numba: in one pass over a tile what torch does in several, with the same bits.

They hold no lock of the interpreter, so that threads with tiles of their own do not wait for each other. Arrays are
flat and contiguous; `array` makes them of tensors. Which number the elements of an array are is told by its dtype:
float32 and float64 are themselves, uint16 holds bfloat16, and int16 holds float16. Arithmetic in float32 rounds after
every operation, as torch does; nothing is contracted or reordered except in sums that are for information.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from workers.scratch import exclusive

ARRAY_DTYPES = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
"""Dtypes of weights that the kernels take, and what they are seen as."""

_SOURCE = hashlib.sha256(Path(__file__).read_bytes() + numba.__version__.encode()).hexdigest()
_config: Any = numba.config
_KEPT_IN = Path(os.path.expanduser(_config.CACHE_DIR or "~/.cache/mergefleet"), _SOURCE[:16])  # noqa: PTH111 - it never raises
_config.CACHE_DIR = str(_KEPT_IN)

_CHUNK = 1024
"""Elements that are worked on at once where one loop feeds another: they stay in the first cache."""


def array(tensor: torch.Tensor) -> np.ndarray:
    """Return the elements of a contiguous CPU tensor as a flat array that shares its memory."""
    flat = tensor.view(-1)
    return flat.view(ARRAY_DTYPES.get(tensor.dtype, tensor.dtype)).numpy()


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    return numba.njit(function, nogil=True, error_model="numpy", **options)


class _Kernel:
    """A compiled loop. Its machine code is kept for the next process, where that can be done safely.

    Numba writes an index and the code one after the other, and trusts what it finds: two processes that compile the
    same loop for other types at the same time could leave one's code under the other's name. So one process at a time
    compiles, in a directory that belongs to this very source.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._seen: set[tuple[object, ...]] = set()
        try:
            self._loop = _jit(function, cache=True)
        except RuntimeError:  # no directory can be written
            self._loop = _jit(function)

    def __call__(self, *arguments: Any) -> Any:
        """Run it."""
        kinds = tuple(getattr(argument, "dtype", type(argument)) for argument in arguments)
        if kinds in self._seen:
            return self._loop(*arguments)
        try:
            with exclusive(_KEPT_IN / "lock"):
                result = self._loop(*arguments)
        except OSError:  # the directory is full, or is gone
            self._loop = _jit(self._function)
            result = self._loop(*arguments)
        self._seen.add(kinds)
        return result


def _primitive(typed: Callable[..., Any]) -> Any:
    """Return what compiled code can call, from a function of its arguments' types."""
    return intrinsic(typed)


@_primitive
def _lift(_context: Any, element: Any) -> Any:
    """Return an element as the number it stands for."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        value = arguments[0]
        if element == types.uint16:
            wide = builder.zext(value, ir.IntType(32))
            return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())
        if element == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    number = types.float32 if element in (types.uint16, types.int16) else element
    return number(element), generate


@_primitive
def _lower(_context: Any, number: Any, array_type: Any) -> Any:
    """Return a number rounded to nearest, ties to even, as an element of an array."""
    element = array_type.dtype

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        value = arguments[0]
        if element == types.uint16:
            word = ir.IntType(32)
            bits = builder.bitcast(value, word)
            upper = builder.lshr(bits, ir.Constant(word, 16))
            odd = builder.and_(upper, ir.Constant(word, 1))
            rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
            short = builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))
            is_nan = builder.fcmp_unordered("uno", value, value)  # rounding could carry its bits over into a zero's
            return builder.select(is_nan, ir.Constant(ir.IntType(16), 0x7FC0), short)
        if element == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        return value if number == element else builder.fptrunc(value, ir.FloatType())

    return element(number, array_type), generate


@_primitive
def _magnitude_bits(_context: Any, number: Any) -> Any:
    """Return the bits of a number without its sign: in the order of magnitudes, infinity next to last, NaN last."""
    num_bits = 64 if number == types.float64 else 32

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        word = ir.IntType(num_bits)
        return builder.and_(builder.bitcast(arguments[0], word), ir.Constant(word, 2 ** (num_bits - 1) - 1))

    return (types.uint64 if num_bits == 64 else types.uint32)(number), generate


@_primitive
def _of_bits(_context: Any, bits: Any) -> Any:
    """Return the number with these bits."""
    is_wide = bits == types.uint64

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType() if is_wide else ir.FloatType())

    return (types.float64 if is_wide else types.float32)(bits), generate


@_Kernel
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
        element = _lower(np.float32(np.float32(delta[i] * scaling) + _lift(weight[i])), rounded)
        rounded[i] = element
        bits = _magnitude_bits(_lift(element))
        largest = max(largest, bits)
    return np.isfinite(_of_bits(largest))


@functools.partial(_jit, fastmath={"reassoc"})
def _dot(left: Any, right: Any) -> Any:
    total = left.dtype.type(0)
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@_Kernel
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
    lifted, errors = np.empty(_CHUNK, delta.dtype), np.empty(_CHUNK, delta.dtype)
    weight_square, delta_square, error_delta, num_different = 0.0, 0.0, 0.0, 0
    largest = _magnitude_bits(delta.dtype.type(0))
    for begin in range(0, weight.size, _CHUNK):
        w, m, d = weight[begin : begin + _CHUNK], merged[begin : begin + _CHUNK], delta[begin : begin + _CHUNK]
        num_here = np.uint32(0)
        for i in range(w.size):
            lifted[i] = _lift(w[i])
            total = lifted[i] + d[i]
            num_here = np.uint32(num_here + np.uint32(_lower(total, merged) != m[i]))
            errors[i] = _lift(m[i]) - total
            bits = _magnitude_bits(errors[i])
            largest = max(largest, bits)
        weight_square += _dot(lifted[: w.size], lifted[: w.size])
        delta_square += _dot(d, d)
        error_delta += _dot(errors[: w.size], d)
        if num_here:
            for i in range(w.size):
                if _lower(lifted[i] + d[i], merged) != m[i]:
                    if num_different < places.size:
                        places[num_different] = begin + i
                    num_different += 1
    return weight_square, delta_square, error_delta, _of_bits(largest), num_different


@_Kernel
def square(weight: Any) -> Any:
    """Return the squared norm of a weight."""
    lifted = np.empty(_CHUNK, np.float32)
    total = 0.0
    for begin in range(0, weight.size, _CHUNK):
        w = weight[begin : begin + _CHUNK]
        for i in range(w.size):
            lifted[i] = _lift(w[i])
        total += _dot(lifted[: w.size], lifted[: w.size])
    return total


@_Kernel
def square_difference(left: Any, right: Any) -> Any:
    """Return the squared norm of the difference of two weights."""
    differences = np.empty(_CHUNK, np.float32)
    total = 0.0
    for begin in range(0, left.size, _CHUNK):
        a, b = left[begin : begin + _CHUNK], right[begin : begin + _CHUNK]
        for i in range(a.size):
            differences[i] = _lift(a[i]) - _lift(b[i])
        total += _dot(differences[: a.size], differences[: a.size])
    return total


@_Kernel
def quantize(weight: Any, middles: Any, places: Any, codes: Any, absmax: Any) -> Any:
    """Quantize blocks of 64 to 4 bits, as `quantize_4bit` of bitsandbytes 0.50.2 does on the CPU, bit for bit.

    It looks a value up among the middles between the 16 values there are, by binary search; here those that are not
    below it are counted, for many values at once. NaN counts as above all of them, as there.

    Args:
        weight: elements, whole blocks.
        middles: tuple of 15 float32, ascending.
        places: uint8 [16]: the code of each value, ascending.
        codes: uint8, gets two codes a byte.
        absmax: float32, gets the scale of each block.
    """
    m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14 = middles
    num_above = np.empty(64, np.int32)
    in_order = True
    for k in range(16):
        in_order &= places[k] == k
    for block in range(absmax.size):
        w = weight[block * 64 : block * 64 + 64]
        largest = np.uint32(0)
        for i in range(64):
            bits = _magnitude_bits(_lift(w[i]))
            largest = max(largest, bits)
        scale = _of_bits(largest)
        absmax[block] = scale
        inverse = np.float32(1) / (max(scale, np.float32(1e-38)))
        for i in range(64):
            x = np.float32(_lift(w[i]) * inverse)
            x = max(x, np.float32(-1))
            x = min(x, np.float32(1))
            n = np.int32(15)
            # Written out, or LLVM does not take eight values at a time.
            n = np.int32(n - np.int32(x <= m0))
            n = np.int32(n - np.int32(x <= m1))
            n = np.int32(n - np.int32(x <= m2))
            n = np.int32(n - np.int32(x <= m3))
            n = np.int32(n - np.int32(x <= m4))
            n = np.int32(n - np.int32(x <= m5))
            n = np.int32(n - np.int32(x <= m6))
            n = np.int32(n - np.int32(x <= m7))
            n = np.int32(n - np.int32(x <= m8))
            n = np.int32(n - np.int32(x <= m9))
            n = np.int32(n - np.int32(x <= m10))
            n = np.int32(n - np.int32(x <= m11))
            n = np.int32(n - np.int32(x <= m12))
            n = np.int32(n - np.int32(x <= m13))
            n = np.int32(n - np.int32(x <= m14))
            num_above[i] = n
        packed = codes[block * 32 : block * 32 + 32]
        if in_order:
            for i in range(32):
                packed[i] = np.uint8(np.int32(num_above[2 * i] << np.int32(4)) | num_above[2 * i + 1])
        else:
            for i in range(32):
                packed[i] = np.uint8(places[num_above[2 * i]] << np.uint8(4)) | places[num_above[2 * i + 1]]


@_Kernel
def dequantize(codes: Any, absmax: Any, pairs: Any, blocksize: Any, weight: Any) -> Any:
    """Turn 4-bit codes into a weight, as bitsandbytes does: value times scale in float32, rounded once.

    Args:
        codes: uint8, two a byte.
        absmax: float32, the scale of each block.
        pairs: float32 [512], the two values of each byte.
        blocksize: even.
        weight: gets the elements; the last block may be cut short.
    """
    values = np.empty(blocksize, np.float32)
    for block in range(absmax.size):
        scale = absmax[block]
        target = weight[block * blocksize : block * blocksize + blocksize]
        source = codes[block * blocksize // 2 : (block * blocksize + target.size + 1) // 2]
        # Looked up first, and then many are multiplied and rounded at once.
        for i in range(source.size):
            values[2 * i] = pairs[2 * source[i]]
            values[2 * i + 1] = pairs[2 * source[i] + 1]
        for i in range(target.size):
            target[i] = _lower(np.float32(values[i] * scale), weight)
