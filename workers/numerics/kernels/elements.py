"""What the elements of an array are: float32 and float64 are themselves, uint16 holds bfloat16, int16 holds float16."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types

from workers.numerics.kernels.compiled import primitive

ARRAY_DTYPES = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
"""Dtypes of weights that the kernels take, and what they are seen as."""
_WORD = ir.IntType(32)


def array(tensor: torch.Tensor) -> np.ndarray:
    """Return the elements of a contiguous CPU tensor as a flat array that shares its memory."""
    if not tensor.is_contiguous():
        raise ValueError(f"a kernel was given a tensor of shape {list(tensor.shape)} that is not contiguous")
    kind = ARRAY_DTYPES.get(tensor.dtype)
    return (tensor if kind is None else tensor.view(kind)).numpy().reshape(-1)


def _as(value: Any, lane: Any) -> Any:
    """Return the type of a value with lanes of another type."""
    return ir.VectorType(lane, value.type.count) if isinstance(value.type, ir.VectorType) else lane


def _constant(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def lifted(builder: Any, value: Any, element: Any) -> Any:
    """Return the number that an element stands for, or many of them: float32, or what the element is.

    Args:
        builder: that words of LLVM are written with.
        value: the element, or a vector of such.
        element: Numba's type of it.
    """
    if element == types.uint16:
        word = _as(value, _WORD)
        wide = builder.shl(builder.zext(value, word), _constant(word, 16))
        return builder.bitcast(wide, _as(value, ir.FloatType()))
    if element == types.int16:
        return builder.fpext(builder.bitcast(value, _as(value, ir.HalfType())), _as(value, ir.FloatType()))
    return value


@primitive
def lift(_context: Any, element: Any) -> Any:
    """Return an element as the number it stands for."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return lifted(builder, arguments[0], element)

    number = types.float32 if element in (types.uint16, types.int16) else element
    return number(element), generate


def _rounded_word(builder: Any, value: Any) -> Any:
    """Return a word whose upper half is a float32 rounded to bfloat16."""
    word = _as(value, _WORD)
    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, _constant(word, 16)), _constant(word, 1))
    return builder.add(builder.add(bits, _constant(word, 0x7FFF)), odd)


def _rounded(builder: Any, number: Any, value: Any, element: Any) -> Any:
    """Return a number rounded to nearest, ties to even, as an element; NaN in bfloat16 may become anything."""
    short = _as(value, ir.IntType(16))
    if element == types.uint16:
        return builder.trunc(builder.lshr(_rounded_word(builder, value), _constant(_as(value, _WORD), 16)), short)
    if element == types.int16:
        return builder.bitcast(builder.fptrunc(value, _as(value, ir.HalfType())), short)
    return value if number == element else builder.fptrunc(value, ir.FloatType())


def rounded_to(builder: Any, number: Any, value: Any, element: Any) -> Any:
    """Return a number rounded to nearest, ties to even, as an element, or many of them.

    Args:
        builder: that words of LLVM are written with.
        number: Numba's type of the number.
        value: the number, or a vector of such.
        element: Numba's type of the element.
    """
    rounded = _rounded(builder, number, value, element)
    if element != types.uint16:
        return rounded
    is_nan = builder.fcmp_unordered("uno", value, value)  # rounding could carry its bits over into a zero's
    return builder.select(is_nan, _constant(rounded.type, 0x7FC0), rounded)


def _lowered_by(rounded: Callable[..., Any], number: Any, array_type: Any) -> Any:
    element = array_type.dtype

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return rounded(builder, number, arguments[0], element)

    return element(number, array_type), generate


@primitive
def lower(_context: Any, number: Any, array_type: Any) -> Any:
    """Return a number rounded to nearest, ties to even, as an element of an array."""
    return _lowered_by(rounded_to, number, array_type)


@primitive
def lower_number(_context: Any, number: Any, array_type: Any) -> Any:
    """Return what `lower` does, faster, for those who look for NaN by themselves: it may become anything."""
    return _lowered_by(_rounded, number, array_type)


@primitive
def off_nearest(_context: Any, number: Any, element: Any) -> Any:
    """Return the bits in which an element differs from a number rounded to nearest, ties to even; any for NaN."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        value, found = arguments
        if element == types.uint16:  # in whole words, which vectors hold as many of as of the numbers
            found = builder.shl(builder.zext(found, _WORD), ir.Constant(_WORD, 16))
            upper = builder.and_(_rounded_word(builder, value), ir.Constant(_WORD, 0xFFFF0000))
            return builder.xor(upper, found)
        bits = ir.IntType(element.bitwidth)
        rounded = builder.bitcast(_rounded(builder, number, value, element), bits)
        different = builder.xor(rounded, builder.bitcast(found, bits))
        return different if element.bitwidth == 32 else builder.zext(different, _WORD)

    return types.uint32(number, element), generate


@primitive
def different_bits(_context: Any, left: Any, right: Any) -> Any:
    """Return the bits in which two elements differ."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        kind = ir.IntType(left.bitwidth)
        bits = builder.xor(*(builder.bitcast(value, kind) for value in arguments))
        return bits if left.bitwidth == 32 else builder.zext(bits, _WORD)

    return types.uint32(left, right), generate


@primitive
def with_product(_context: Any, total: Any, left: Any, right: Any) -> Any:
    """Return a sum with a product added to it, which may be done in any order and with fewer roundings."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        flags = ("reassoc", "nsz", "contract")
        return builder.fadd(arguments[0], builder.fmul(*arguments[1:], flags=flags), flags=flags)

    return total(total, left, right), generate


@primitive
def magnitude_bits(_context: Any, number: Any) -> Any:
    """Return the bits of a number without its sign: in the order of magnitudes, infinity next to last, NaN last."""
    num_bits = 64 if number == types.float64 else 32

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        word = ir.IntType(num_bits)
        return builder.and_(builder.bitcast(arguments[0], word), ir.Constant(word, 2 ** (num_bits - 1) - 1))

    return (types.uint64 if num_bits == 64 else types.uint32)(number), generate


@primitive
def of_bits(_context: Any, bits: Any) -> Any:
    """Return the number with these bits."""
    is_wide = bits == types.uint64

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType() if is_wide else ir.FloatType())

    return (types.float64 if is_wide else types.float32)(bits), generate


@primitive
def place(_context: Any, element: Any) -> Any:
    """Return which number of 16 bits an element is, by its bits.

    For float32 that is the bfloat16 it is, or else an odd one that lies on the same side of all even ones.
    """

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        (value,) = arguments
        if element.bitwidth == 16:
            return value
        bits = builder.bitcast(value, _WORD)
        lower_half = builder.and_(bits, ir.Constant(_WORD, 0xFFFF))
        is_between = builder.zext(builder.icmp_unsigned("!=", lower_half, ir.Constant(_WORD, 0)), _WORD)
        return builder.trunc(builder.or_(builder.lshr(bits, ir.Constant(_WORD, 16)), is_between), ir.IntType(16))

    return types.uint16(element), generate


def _in_order(builder: Any, bits: Any) -> Any:
    """Return bits with those below the sign turned around where it is set; done twice, that is nothing."""
    sign = builder.ashr(bits, ir.Constant(_WORD, 31))
    return builder.xor(bits, builder.and_(sign, ir.Constant(_WORD, 0x7FFFFFFF)))


@primitive
def ordered_bits(_context: Any, number: Any) -> Any:
    """Return the bits of a float32 as an integer that is in the order of the numbers; NaN lies beyond all of them."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return _in_order(builder, builder.bitcast(arguments[0], _WORD))

    return types.int32(number), generate


@primitive
def of_ordered_bits(_context: Any, bits: Any) -> Any:
    """Return the float32 that has these bits in order."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(_in_order(builder, arguments[0]), ir.FloatType())

    return types.float32(bits), generate
