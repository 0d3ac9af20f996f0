"""4-bit weights, as bitsandbytes 0.50.2 makes and reads them, bit for bit."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import literal_unroll, types

from workers.numerics.kernels.compiled import Kernel, jit, primitive
from workers.numerics.kernels.elements import lift, lower, magnitude_bits, of_bits, rounded_to
from workers.numerics.kernels.vectors import INT64, call, data_pointer, has_instructions, load, shuffle, splat, store

_BYTES = ir.VectorType(ir.IntType(8), 16)
_LOOKS_UP = has_instructions("ssse3")
"""Whether the processor looks sixteen bytes up in a register at once."""


@jit
def _scale_of(weight: Any) -> Any:
    largest = np.uint32(0)
    for i in range(weight.size):
        bits = magnitude_bits(lift(weight[i]))
        largest = max(largest, bits)
    return of_bits(largest)


def quantize(weight: Any, middles: Any, places: Any, codes: Any, absmax: Any) -> None:
    """Quantize blocks of 64 to 4 bits, as `quantize_4bit` of bitsandbytes 0.50.2 does on the CPU, bit for bit.

    It looks a value up among the middles between the 16 values there are, by binary search; this counts those that are
    below it. NaN counts as above all of them, as there.

    Args:
        weight: elements, whole blocks.
        middles: float32 [15], ascending.
        places: uint8 [16]: the code of each value, ascending.
        codes: uint8, gets two codes a byte.
        absmax: float32, gets the scale of each block.
    """
    _quantize(weight, tuple(middles), places, codes, absmax)


@Kernel
def _quantize(weight: Any, middles: Any, places: Any, codes: Any, absmax: Any) -> None:
    num_above = np.empty(64, np.int32)
    for block in range(absmax.size):
        w = weight[block * 64 : block * 64 + 64]
        absmax[block] = _scale_of(w)
        inverse = np.float32(1) / max(absmax[block], np.float32(1e-38))
        for i in range(64):
            x = np.float32(lift(w[i]) * inverse)
            n = np.int32(15)
            for middle in literal_unroll(middles):
                n = np.int32(n - np.int32(x <= middle))
            num_above[i] = n
        packed = codes[block * 32 : block * 32 + 32]
        for i in range(32):
            packed[i] = np.uint8(places[num_above[2 * i]] << np.uint8(4)) | places[num_above[2 * i + 1]]


def dequantize(codes: Any, absmax: Any, pairs: Any, blocksize: int, weight: Any) -> None:
    """Turn 4-bit codes into a weight, as bitsandbytes does: value times scale in float32, rounded once.

    Args:
        codes: uint8, two a byte.
        absmax: float32, the scale of each block.
        pairs: float32 [512], the two values of each byte.
        blocksize: even.
        weight: gets the elements; the last block may be cut short.
    """
    num_whole = 0
    if _LOOKS_UP and weight.itemsize == 2 and blocksize % 64 == 0:
        num_whole = weight.size // blocksize
        values = np.ascontiguousarray(pairs[1:32:2])
        _dequantize_whole(codes, absmax[:num_whole], values, blocksize, weight)
    if num_whole < absmax.size:
        begin = num_whole * blocksize
        _dequantize(codes[begin // 2 :], absmax[num_whole:], pairs, blocksize, weight[begin:])


@Kernel
def _dequantize(codes: Any, absmax: Any, pairs: Any, blocksize: Any, weight: Any) -> None:
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
            target[i] = lower(np.float32(values[i] * scale), weight)


def dequantize_groups(codes: Any, scales: Any, values: Any, group_size: int, weight: Any) -> None:
    """Turn 4-bit codes into a weight: value times scale in float32, rounded once.

    Args:
        codes: uint8, two a byte, the first in the lower half.
        scales: float32, of each group.
        values: what the 16 codes stand for.
        group_size: even.
        weight: gets the elements.
    """
    table = np.array(values, np.float32)
    pairs = np.stack([np.tile(table, 16), table.repeat(16)], axis=1).reshape(-1)
    _dequantize(codes, scales, pairs, group_size, weight)


@primitive
def _look_up(_context: Any, values: Any, scale: Any, codes: Any, target: Any, begin: Any) -> Any:
    """Put 64 elements of two bytes into an array, from the one at `begin` on, for the 32 bytes of their codes."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        values_pointer, codes_pointer, target_pointer = (
            data_pointer(context, builder, kind, arguments[place])
            for place, kind in ((0, values), (2, codes), (3, target))
        )
        first = arguments[4]
        first_code = builder.lshr(first, ir.Constant(INT64, 1))
        sixteen = load(builder, values_pointer, ir.Constant(INT64, 0), ir.VectorType(ir.FloatType(), 16))
        products = builder.fmul(sixteen, splat(builder, arguments[1], 16))
        # A block has sixteen different elements at most. One register holds their lower bytes, another the upper ones.
        elements = rounded_to(builder, types.float32, products, target.dtype)
        halves = (elements, builder.lshr(elements, ir.Constant(elements.type, [8] * 16)))
        tables = [builder.trunc(half, _BYTES) for half in halves]
        for part in range(2):
            pairs = load(builder, codes_pointer, builder.add(first_code, ir.Constant(INT64, 16 * part)), _BYTES)
            both = builder.lshr(pairs, _each(4)), builder.and_(pairs, _each(15))
            for number, chosen in enumerate(_in_turns(builder, *both)):
                bytes_ = (call(builder, "llvm.x86.ssse3.pshuf.b.128", table, chosen) for table in tables)
                for eight, found in enumerate(_in_turns(builder, *bytes_)):
                    place = builder.add(first, ir.Constant(INT64, 32 * part + 16 * number + 8 * eight))
                    store(builder, found, target_pointer, place)
        return context.get_dummy_value()

    return types.none(values, scale, codes, target, begin), generate


@Kernel
def _dequantize_whole(codes: Any, absmax: Any, values: Any, blocksize: Any, weight: Any) -> None:
    for block in range(absmax.size):
        begin = block * blocksize
        for place in range(begin, begin + blocksize, 64):
            _look_up(values, absmax[block], codes, weight, place)


def _each(value: int) -> Any:
    return ir.Constant(_BYTES, [value] * 16)


def _in_turns(builder: Any, left: Any, right: Any) -> Any:
    """Return the lanes of two registers of bytes in turns: those of their first halves, and of their second."""
    return (
        shuffle(builder, left, right, [at for lane in range(8) for at in (begin + lane, begin + lane + 16)])
        for begin in (0, 8)
    )
