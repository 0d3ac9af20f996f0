"""SHA-256 (FIPS 180-4) of one or two streams at a time, with the instructions that processors have for it.

One round waits for the one before it, and the unit that computes it is idle half of the time. The rounds of a second
stream fit in between: two take little longer than one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from workers.numerics.kernels.compiled import Kernel, primitive
from workers.numerics.kernels.vectors import INT64, call, data_pointer, has_instructions, load, shuffle, store

BLOCK_BYTES = 64
AVAILABLE = has_instructions("sha", "sse4.1")
"""Whether this processor has the instructions."""

_WORD = ir.IntType(32)
_WORDS = ir.VectorType(_WORD, 4)


def _roots(degree: int, count: int) -> list[int]:
    """Return the first 32 bits behind the point of the square or cube roots of the first primes."""
    primes = [n for n in range(2, 312) if all(n % divisor for divisor in range(2, n))][:count]
    roots = []
    for prime in primes:
        low, high = 0, prime << 32
        while high - low > 1:  # the root times 2**32, rounded down, in integers
            middle = (low + high) // 2
            low, high = (middle, high) if middle**degree <= prime << 32 * degree else (low, middle)
        roots.append(low % (1 << 32))
    return roots


_CONSTANTS = _roots(3, 64)
_INITIAL = _roots(2, 8)
_A, _B, _C, _D, _E, _F, _G, _H = range(8)
_LANES = (_F, _E, _B, _A, _H, _G, _D, _C)
"""The words of a state in the order in which the instructions want them."""


def initial_state() -> np.ndarray:
    """Return the state before the first block: uint32 [8]."""
    return np.array([_INITIAL[lane] for lane in _LANES], np.uint32)


def digest(state: np.ndarray) -> bytes:
    """Return the digest that a state stands for, after the last block."""
    words = np.empty(8, ">u4")
    words[list(_LANES)] = state
    return words.tobytes()


def _four_constants(begin: int) -> Any:
    return ir.Constant(_WORDS, [ir.Constant(_WORD, value) for value in _CONSTANTS[begin : begin + 4]])


class _Stream:
    """One of the streams whose rounds are written down in turns."""

    def __init__(self, builder: Any, state: Any, data: Any) -> None:
        self._builder = builder
        self._state = state
        self._data = data
        self._slots = [cgutils.alloca_once_value(builder, self._half(half)) for half in (0, 1)]
        self._before: list[Any] = []
        self._abef = self._cdgh = None
        self._words: list[Any] = []

    def _half(self, half: int) -> Any:
        return load(self._builder, self._state, ir.Constant(INT64, 4 * half), _WORDS)

    def begin(self, offset: Any) -> None:
        """Take up the block at an offset."""
        builder = self._builder
        self._before = [self._abef, self._cdgh] = [builder.load(slot) for slot in self._slots]
        places = [builder.add(offset, ir.Constant(offset.type, 16 * part)) for part in range(4)]
        self._words = [call(builder, "llvm.bswap.v4i32", load(builder, self._data, at, _WORDS)) for at in places]

    def four_rounds(self, number: int) -> None:
        """Write down rounds 4 * number to 4 * number + 3."""
        builder, words = self._builder, self._words
        if number >= 4:
            a, b, c, d = words[-4:]
            sums = builder.add(call(builder, "llvm.x86.sha256msg1", a, b), shuffle(builder, c, d, (1, 2, 3, 4)))
            words.append(call(builder, "llvm.x86.sha256msg2", sums, d))
        terms = builder.add(words[number], _four_constants(4 * number))
        self._cdgh = call(builder, "llvm.x86.sha256rnds2", self._cdgh, self._abef, terms)
        upper = shuffle(builder, terms, terms, (2, 3, 0, 0))
        self._abef = call(builder, "llvm.x86.sha256rnds2", self._abef, self._cdgh, upper)

    def end(self) -> None:
        """Add what the block has made to what was there before it."""
        for slot, now, before in zip(self._slots, (self._abef, self._cdgh), self._before, strict=True):
            self._builder.store(self._builder.add(now, before), slot)

    def leave(self) -> None:
        """Put the state back."""
        for half, slot in enumerate(self._slots):
            store(self._builder, self._builder.load(slot), self._state, ir.Constant(INT64, 4 * half))


def _write_down(context: Any, builder: Any, kinds: Sequence[Any], arguments: Sequence[Any]) -> Any:
    *arrays, num_blocks = arguments
    pointers = [data_pointer(context, builder, kind, value) for kind, value in zip(kinds, arrays, strict=False)]
    streams = [_Stream(builder, *each) for each in zip(pointers[::2], pointers[1::2], strict=True)]
    with cgutils.for_range(builder, num_blocks) as loop:
        offset = builder.mul(loop.index, ir.Constant(loop.index.type, BLOCK_BYTES))
        for stream in streams:
            stream.begin(offset)
        for number in range(16):
            for stream in streams:
                stream.four_rounds(number)
        for stream in streams:
            stream.end()
    for stream in streams:
        stream.leave()
    return context.get_dummy_value()


@primitive
def _blocks(_context: Any, state: Any, data: Any, num_blocks: Any) -> Any:
    """Take a state on by some blocks."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _write_down(context, builder, signature.args, arguments)

    return types.none(state, data, num_blocks), generate


@primitive
def _blocks_of_both(_context: Any, state: Any, data: Any, other_state: Any, other_data: Any, num_blocks: Any) -> Any:
    """Take two states on by as many blocks each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _write_down(context, builder, signature.args, arguments)

    return types.none(state, data, other_state, other_data, num_blocks), generate


@Kernel
def compress(state: Any, data: Any) -> None:
    """Take a state on.

    Args:
        state: uint32 [8], as `initial_state` returns it.
        data: uint8, whole blocks of 64.
    """
    _blocks(state, data, data.size // BLOCK_BYTES)


@Kernel
def compress_both(state: Any, data: Any, other_state: Any, other_data: Any) -> None:
    """Take two states on together.

    Args:
        state: as in `compress`.
        data: as in `compress`.
        other_state: of the other stream.
        other_data: as much of it.
    """
    _blocks_of_both(state, data, other_state, other_data, data.size // BLOCK_BYTES)
