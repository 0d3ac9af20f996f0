"""Digests of files whose bytes are written in any order, taken from the buffers they were written from.

A digest takes the bytes of a file in order. What comes too early is kept in its buffer until it is its turn, or read
back where buffers are wanted for others. Two files are hashed by one thread in little more time than one, so a file
waits a moment for another.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.files import sha256
from workers.files.buffers import Buffer, BufferPool
from workers.files.tensor_io import tensor_bytes

_PIECE_BYTES = 4 << 20
"""What has to be read back is read in pieces of this size."""
_MAX_WAITING = 2
"""Ranges of a file that wait for another file."""


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


@dataclass(frozen=True, slots=True)
class _Due:
    """Bytes of a file that a thread is to hash."""

    file: "FileHash"
    begin: int
    num_bytes: int
    data: memoryview | None
    """The bytes; None if they have to be read back."""

    def read(self) -> memoryview | None:
        """Return the bytes; None if they cannot be read, which the file is told."""
        if self.data is not None:
            return self.data
        try:
            piece = torch.empty(self.num_bytes, dtype=torch.uint8)
            self.file.read(piece, self.begin)
        except BaseException as error:  # noqa: BLE001 - raised where the pass ends
            self.file.on_error(error)
            return None
        return tensor_bytes(piece)


class FileHash:
    """The SHA-256 of one file that is being written."""

    def __init__(
        self,
        num_bytes: int,
        *,
        read: Callable[[torch.Tensor, int], None],
        on_hashed: Callable[[str], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """Begin before its first byte.

        Args:
            num_bytes: of the file.
            read: fills a tensor from an offset of it, which is written.
            on_hashed: told the digest, in hexadecimal, by the thread that hashed the last bytes.
            on_error: told what went wrong on the way; it closes the file with its hasher.
        """
        self.num_bytes = num_bytes
        self.read = read
        self.on_hashed = on_hashed
        self.on_error = on_error
        self.sha256 = sha256.new()
        self._frontier = 0
        """All before it is written."""
        self._in_order: deque[_Written] = deque()
        """What is written before the frontier."""
        self._early: dict[int, _Written] = {}
        """What is written behind the frontier, by its begin."""
        self.taken = False
        """Whether a thread is at it, or it is in line for one."""

    @property
    def num_due(self) -> int:
        """Ranges that can be hashed."""
        return len(self._in_order)

    @property
    def whole(self) -> bool:
        """Whether all of it is written."""
        return self._frontier == self.num_bytes

    def add(self, begin: int, buffer: Buffer, *, keep: bool) -> None:
        """Note what is written; what is not kept is read back, if it comes too early."""
        written = self._early[begin] = _Written(begin, begin + buffer.values.numel(), buffer)
        while self._frontier in self._early:
            self._in_order.append(self._early.pop(self._frontier))
            self._frontier = self._in_order[-1].end
        if begin in self._early and not keep:
            written.release()

    def due(self) -> _Due:
        """Return what is to be hashed next."""
        written = self._in_order[0]
        num_bytes = written.end - written.begin
        if written.buffer is None:
            return _Due(self, written.begin, min(num_bytes, _PIECE_BYTES), None)
        return _Due(self, written.begin, num_bytes, tensor_bytes(written.buffer.values[-num_bytes:]))

    def advance(self, num_bytes: int) -> None:
        """Note that some of what was due is hashed."""
        written = self._in_order[0]
        written.begin += num_bytes
        if written.begin == written.end:
            self._in_order.popleft().release()

    def let_go(self) -> None:
        """Let go of all buffers."""
        for written in (*self._in_order, *self._early.values()):
            written.release()
        self._in_order.clear()
        self._early.clear()


class Hasher:
    """Hashes the files of one pass, on the threads that bring their bytes."""

    def __init__(self, buffers: BufferPool, *, num_spare: int, num_threads: int) -> None:
        """Start without files.

        Args:
            buffers: that the bytes come in.
            num_spare: while fewer of them are free, none is kept for the bytes before it to be hashed, nor for another
                file to be hashed with.
            num_threads: threads that may hash at the same time.
        """
        self._buffers = buffers
        self._pairs = sha256.pairs()
        self._num_spare = num_spare
        self._num_idle = num_threads
        self._lock = threading.Lock()
        self._open: set[FileHash] = set()
        self._line: deque[FileHash] = deque()
        """Files with bytes that are due, and no thread at them."""

    def open(self, file: FileHash) -> None:
        """Begin with a file."""
        with self._lock:
            self._open.add(file)

    def add(self, file: FileHash, begin: int, buffer: Buffer) -> None:
        """Take bytes that are written, and hash what is due, of any file.

        Args:
            file: theirs.
            begin: their offset in it.
            buffer: their memory, held for this.
        """
        with self._lock:
            if file in self._open:
                file.add(begin, buffer, keep=self._buffers.num_free >= self._num_spare)
                self._queue(file)
            else:
                buffer.release()
        while taken := self._take():
            self._hash(taken)

    def close(self, file: FileHash) -> None:
        """Be done with a file, hashed or not, and let go of its buffers. Idempotent."""
        with self._lock:
            if file in self._open:
                self._open.remove(file)
                if file in self._line:
                    self._line.remove(file)
                # Nobody hashes beyond a gap: what is kept for that would be missed by those who wait for a buffer.
                file.let_go()

    def _queue(self, file: FileHash) -> None:
        if file.num_due and not file.taken:
            file.taken = True
            self._line.append(file)

    def _take(self) -> list[_Due]:
        """Return what is due of two files, or of one that should not wait for another; nothing where there is none."""
        with self._lock:
            if not self._line or not self._num_idle:
                return []
            if len(self._line) == 1 and self._may_wait(self._line[0]):
                return []
            taken = [self._line.popleft().due() for _ in range(min(2 if self._pairs else 1, len(self._line)))]
            self._num_idle -= 1
            return taken

    def _may_wait(self, file: FileHash) -> bool:
        """Whether a file with bytes that are due may wait for another one to be hashed with."""
        is_urgent = file.num_due > _MAX_WAITING or file.whole or self._buffers.num_free < self._num_spare
        return self._pairs and len(self._open) > 1 and not is_urgent

    def _hash(self, taken: list[_Due]) -> None:
        found = [(due.file, data) for due in taken if (data := due.read()) is not None]
        num_bytes = min((len(data) for _, data in found), default=0)
        try:
            _update([(file.sha256, data[:num_bytes]) for file, data in found])
        except BaseException as error:  # noqa: BLE001 - raised where the pass ends
            for file, _ in found:
                file.on_error(error)
        done = []
        with self._lock:
            self._num_idle += 1
            for file, _ in found:
                file.taken = False
                if file in self._open:  # it may have failed meanwhile, and its bytes may be others by now
                    file.advance(num_bytes)
                    self._queue(file)
                    if file.whole and not file.num_due:
                        done.append(file)
        for file in done:
            try:
                file.on_hashed(file.sha256.hexdigest())
            except BaseException as error:  # noqa: BLE001 - raised where the pass ends
                file.on_error(error)


def _update(digests: list[tuple[sha256.Digest, memoryview]]) -> None:
    """Take one or two digests on."""
    if len(digests) == 2:
        (first, data), (second, other_data) = digests
        sha256.update_both(first, data, second, other_data)
    elif digests:
        (digest, data), *_ = digests
        digest.update(data)
