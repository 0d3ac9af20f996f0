"""Digests of files whose bytes are written in any order, taken from the buffers they were written from.

SHA-256 takes the bytes of a file in order. What comes too early is kept in its buffer until it is its turn, or read
back where buffers are wanted for others.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.files.buffers import Buffer, BufferPool
from workers.files.tensor_io import tensor_bytes

_PIECE_BYTES = 4 << 20
"""What has to be read back is read in pieces of this size."""


@dataclass(slots=True)
class _Written:
    """A range of a file that is written and not hashed yet."""

    begin: int
    end: int
    buffer: Buffer | None
    """Holds the bytes before `end`; without it they are read back."""

    def release(self) -> None:
        """Let go of the bytes."""
        if self.buffer is not None:
            self.buffer.release()
            self.buffer = None


class ByteCount:
    """The bytes of a file that no one wants the digest of, counted."""

    digest = None

    def __init__(self, num_bytes: int) -> None:
        """Begin before its first byte.

        Args:
            num_bytes: of the file.
        """
        self._num_left = num_bytes
        self._lock = threading.Lock()

    def add(self, _: int, buffer: Buffer) -> bool:
        """Take bytes that are written, and let go of them; return whether they were the last ones."""
        num_bytes = buffer.values.numel()
        buffer.release()
        with self._lock:
            self._num_left -= num_bytes
            return self._num_left == 0

    def close(self) -> None:
        """Be done with the file."""


class FileHash:
    """The SHA-256 of one file that is being written. One thread at a time hashes, any that brings bytes."""

    def __init__(
        self, num_bytes: int, buffers: BufferPool, *, num_spare: int, read: Callable[[torch.Tensor, int], None]
    ) -> None:
        """Begin before its first byte.

        Args:
            num_bytes: of the file.
            buffers: that the bytes come in.
            num_spare: while fewer of them are free, none is kept for the bytes before it to be hashed.
            read: fills a tensor from an offset of the file, which is written.
        """
        self._num_bytes = num_bytes
        self._buffers = buffers
        self._num_spare = num_spare
        self._read = read
        self._sha256 = hashlib.sha256()
        self._lock = threading.Lock()
        self._frontier = 0
        """All before it is written."""
        self._in_order: deque[_Written] = deque()
        """What is written before the frontier."""
        self._early: dict[int, _Written] = {}
        """What is written behind the frontier, by its begin."""
        self._taken = False
        """Whether a thread is at it, or was when it failed."""
        self._closed = False

    @property
    def digest(self) -> str:
        """In hexadecimal, once all bytes are hashed."""
        return self._sha256.hexdigest()

    def add(self, begin: int, buffer: Buffer) -> bool:
        """Take bytes that are written, and hash what is due, unless another thread is at it.

        Args:
            begin: their offset in the file.
            buffer: their memory, held for this.

        Returns:
            Whether this call has hashed the last bytes.

        Raises:
            NotFoundError, TransientIOError, NoCapacityError: bytes that came too early cannot be read back.
        """
        with self._lock:
            if self._closed:
                buffer.release()
                return False
            self._note(_Written(begin, begin + buffer.values.numel(), buffer))
        while (due := self._take()) is not None:
            data = self._bytes_of(due)
            self._sha256.update(data)
            if self._advance(len(data)):
                return True
        return False

    def close(self) -> None:
        """Be done with the file, hashed or not, and let go of its buffers. Idempotent."""
        with self._lock:
            self._closed = True
            # Bytes beyond a gap are never hashed: their buffers would be missed by those who wait for one.
            for written in (*self._in_order, *self._early.values()):
                written.release()
            self._in_order.clear()
            self._early.clear()

    def _note(self, written: _Written) -> None:
        self._early[written.begin] = written
        while self._frontier in self._early:
            self._in_order.append(self._early.pop(self._frontier))
            self._frontier = self._in_order[-1].end
        if written.begin in self._early and self._buffers.num_free < self._num_spare:
            written.release()

    def _take(self) -> _Written | None:
        """Return the range that is to be hashed next, for the calling thread; None where there is none for it."""
        with self._lock:
            if self._taken or not self._in_order:
                return None
            self._taken = True
            return self._in_order[0]

    def _advance(self, num_bytes: int) -> bool:
        """Note how much of the range that was taken is hashed; return whether it was the last of the file."""
        with self._lock:
            self._taken = False
            if self._closed:  # its bytes may be others by now
                return False
            due = self._in_order[0]
            due.begin += num_bytes
            if due.begin == due.end:
                self._in_order.popleft().release()
            return self._frontier == self._num_bytes and not self._in_order

    def _bytes_of(self, due: _Written) -> memoryview:
        """Return bytes from the begin of a range: all of them, or those of one piece that is read back."""
        num_bytes = due.end - due.begin
        if due.buffer is not None:
            return due.buffer.data[-num_bytes:]
        piece = torch.empty(min(num_bytes, _PIECE_BYTES), dtype=torch.uint8)
        self._read(piece, due.begin)
        return tensor_bytes(piece)
