"""SHA-256 of two streams at a time, for those who write several files: they wait for it longer than for anything else.

`hashlib` is as fast with one stream, and takes no second. Where the processor has no instructions for SHA-256,
`hashlib` does all of it.
"""

import functools
import hashlib
import struct
from typing import Protocol

import numpy as np

from jobs.errors import InternalError
from workers.numerics.kernels import sha256 as kernel
from workers.numerics.kernels.sha256 import BLOCK_BYTES


class Digest(Protocol):
    """A SHA-256 that grows."""

    def update(self, data: memoryview, /) -> None:
        """Take on bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all so far."""


def new() -> Digest:
    """Return the SHA-256 of nothing yet."""
    return _PairedSha256() if pairs() else hashlib.sha256()


def update_both(first: Digest, first_data: memoryview, second: Digest, second_data: memoryview) -> None:
    """Take two digests on at the same time.

    Args:
        first: one.
        first_data: bytes that it takes on.
        second: another.
        second_data: bytes that that one takes on. Beyond the length of the shorter, each goes alone.
    """
    if isinstance(first, _PairedSha256) and isinstance(second, _PairedSha256):
        blocks, other_blocks = first.up_to_a_block(first_data), second.up_to_a_block(second_data)
        size = min(blocks.size, other_blocks.size) // BLOCK_BYTES * BLOCK_BYTES
        kernel.compress_both(first.state, blocks[:size], second.state, other_blocks[:size])
        first_data, second_data = blocks[size:].data, other_blocks[size:].data
        first.num_bytes += size
        second.num_bytes += size
    first.update(first_data)
    second.update(second_data)


class _PairedSha256:
    """A SHA-256 whose blocks can be worked on together with those of another."""

    def __init__(self) -> None:
        self.state = kernel.initial_state()
        self.num_bytes = 0
        self._rest = np.empty(0, np.uint8)
        """Behind the last whole block."""

    def update(self, data: memoryview, /) -> None:
        """Take on bytes."""
        blocks = self.up_to_a_block(data)
        size = blocks.size // BLOCK_BYTES * BLOCK_BYTES
        kernel.compress(self.state, blocks[:size])
        self.num_bytes += blocks.size
        self._rest = np.concatenate((self._rest, blocks[size:]))

    def up_to_a_block(self, data: memoryview) -> np.ndarray:
        """Take on what fills the last block up; return what is behind it, of which nothing is taken on yet."""
        values = np.frombuffer(data, np.uint8)
        if not self._rest.size:
            return values
        missing = values[: BLOCK_BYTES - self._rest.size]
        self._rest = np.concatenate((self._rest, missing))
        self.num_bytes += missing.size
        if self._rest.size == BLOCK_BYTES:
            kernel.compress(self.state, self._rest)
            self._rest = np.empty(0, np.uint8)
        return values[missing.size :]

    def hexdigest(self) -> str:
        """Return the digest of all so far."""
        length = struct.pack(">Q", 8 * self.num_bytes)
        padding = bytes(-(self.num_bytes + 9) % BLOCK_BYTES)
        last = np.frombuffer(bytearray(self._rest.tobytes() + b"\x80" + padding + length), np.uint8)
        state = self.state.copy()
        kernel.compress(state, last)
        return kernel.digest(state).hex()


@functools.cache
def pairs() -> bool:
    """Return whether two take little longer than one: the processor has instructions for SHA-256.

    All trust in a release hangs on its digests: what was compiled here is tried first.

    Raises:
        InternalError: they make other digests than `hashlib`.
    """
    if not kernel.AVAILABLE:
        return False
    data = np.arange(1000, dtype=np.uint32).view(np.uint8).data
    first, second = _PairedSha256(), _PairedSha256()
    update_both(first, data, second, data[1:])
    found = first.hexdigest(), second.hexdigest()
    expected = hashlib.sha256(data).hexdigest(), hashlib.sha256(data[1:]).hexdigest()
    if found != expected:
        raise InternalError(f"SHA-256 as compiled here gives {found[0]}, hashlib {expected[0]}; report this processor")
    return True
