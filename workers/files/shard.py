"""Shard files of one merged checkpoint: offsets known up front, written in any order, hashed on the way.

Bytes come in buffers and are written and hashed by threads of the pass, so that those that compute do not wait for the
disk. Files that are not read again here are written past the page cache where the file system can do that: their bytes
would be copied once more, into pages that cost as much as all arithmetic, only to be thrown out again. Such files begin
as clones of the base's where the file system can do that, too, and most of their bytes are the same.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.errors import MergefleetError
from jobs.release import Artifact
from workers.files.buffers import PAGE_BYTES, Buffer
from workers.files.conveyor import Conveyor
from workers.files.hashing import ByteCount, FileHash
from workers.files.layout import ShardLayout
from workers.files.local import FileState, file_errors, sha256_of
from workers.files.tensor_io import read_into, write_all

_LARGE_BYTES = 4 << 20
"""From this size on a file's state says whether it was written since."""
_PIECE_BYTES = 4 << 20
"""What comes without a buffer is put into buffers of this size."""
_DIRECT_BYTES = 64 << 10
"""Less than this is not worth its own way past the page cache."""
_FICLONE = 0x40049409
"""Of ioctl_ficlone(2)."""
_CLOCK_SECONDS = 0.02
"""Longer than the clock that stamps files stands still."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A finished file."""

    name: str
    num_bytes: int
    sha256: str | None
    """None where no one asked for it."""
    state: FileState | None
    """Of the file when all of it was written: any later write to it shows, where the file system keeps times finer
    than a fiftieth of a second. None for a small file, which is sooner read again than its times move on."""

    @property
    def artifact(self) -> Artifact:
        """The file as one of a release; it has a digest."""
        assert self.sha256 is not None
        return Artifact(path=self.name, num_bytes=self.num_bytes, sha256=self.sha256)

    def is_as_it_was(self, directory: Path) -> bool:
        """Whether the file is known to hold what was written: it was not written to since, or has its digest."""
        path = directory / self.name
        with file_errors(f"checking {path}", path):
            if FileState.of(path.stat()) == self.state:
                return True
            return self.sha256 is not None and sha256_of(path) == self.sha256


@dataclass(frozen=True, slots=True)
class Origin:
    """A checkpoint that has some of the bytes already, at the same places in files of the same names."""

    directory: Path
    kept: Container[str]
    """Names of the tensors whose bytes it has."""
    states: Mapping[str, FileState]
    """Of the files that have any, by name, from before anything was read."""


class ShardWriter:
    """One output file, header included: every byte is written exactly once, or its origin's, and hashed from memory.

    Files that no one wants the digest of are not hashed.
    """

    def __init__(
        self,
        path: Path,
        layout: ShardLayout,
        conveyor: Conveyor,
        *,
        direct: bool,
        hashed: bool,
        origin: Origin | None,
        on_closed: Callable[[WrittenFile], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self.name = path.name
        self._path = path
        self._num_bytes = layout.num_bytes
        self._conveyor = conveyor
        self._on_closed = on_closed
        self._on_error = on_error
        self._past_cache = -1
        self._origin = Path()
        self._origin_state: FileState | None = None
        self._arrivals: FileHash | ByteCount = ByteCount(self._num_bytes)
        if hashed:
            self._arrivals = FileHash(
                self._num_bytes, conveyor.buffers, num_spare=conveyor.num_spare, read=self._read_back
            )
        with file_errors(f"making {path}", path):
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
            on_block_device = os.major(os.fstat(self._descriptor).st_dev) > 0
            try:
                self._clone(origin)
                self._make_room(layout, origin, on_block_device=on_block_device)
            except OSError:
                # Gone at once: another thread that wants the file meets the same fault, not a file that is in its way.
                path.unlink()
                os.close(self._descriptor)
                raise
            if direct and on_block_device:  # a tmpfs takes the flag, and does more work for it
                with contextlib.suppress(OSError):  # a file system that cannot: through the page cache, then
                    self._past_cache = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)

    def buffer(self, offset: int, num_bytes: int) -> Buffer:
        """Wait for memory for a range of the file."""
        return self._conveyor.buffers.take(num_bytes, offset)

    def write(self, offset: int, buffer: Buffer) -> None:
        """Have a filled buffer written and hashed by others; its bytes stay as they are from now on.

        A fault on the way is told to `on_error`.
        """
        buffer.hold()
        self._conveyor.threads.submit(self._carry, offset, buffer)

    def keep(self, offset: int, buffer: Buffer) -> None:
        """Have bytes hashed that the origin has there, and the file with it."""
        buffer.hold()
        self._conveyor.threads.submit(self._hash, offset, buffer)

    def write_copy(self, offset: int, data: torch.Tensor) -> None:
        """Copy the bytes of a contiguous CPU tensor into buffers and have these written."""
        flat = data.reshape(-1).view(torch.uint8)
        for begin in range(0, flat.numel(), _PIECE_BYTES):
            piece = flat[begin : begin + _PIECE_BYTES]
            with self.buffer(offset + begin, piece.numel()) as buffer:
                buffer.values.copy_(piece)
                self.write(offset + begin, buffer)

    def close(self) -> None:
        """Close the file, whole or not, once no thread writes or hashes any more. Idempotent."""
        self._arrivals.close()
        for descriptor in (self._descriptor, self._past_cache):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._past_cache = -1

    @property
    def cloned(self) -> bool:
        """Whether it began as a clone: what the origin has, it has without a byte written."""
        return self._origin_state is not None

    def _clone(self, origin: Origin | None) -> None:
        """Begin as a clone of the origin's file, where the file system can share blocks between files."""
        if origin is None or self.name not in origin.states:
            return
        self._origin = origin.directory / self.name
        try:
            with self._origin.open("rb") as file:
                if FileState.of(os.fstat(file.fileno())) == origin.states[self.name]:
                    fcntl.ioctl(self._descriptor, _FICLONE, file.fileno())
                    self._origin_state = origin.states[self.name]
        except OSError:
            os.ftruncate(self._descriptor, 0)

    def _make_room(self, layout: ShardLayout, origin: Origin | None, *, on_block_device: bool) -> None:
        """Find out that the disk is full before any work is done.

        Raises:
            OSError: it is.
        """
        needed = self._num_bytes
        if self.cloned:
            assert origin is not None
            needed -= sum(spec.num_bytes for spec in layout.tensors if spec.name in origin.kept)
        elif on_block_device:
            os.posix_fallocate(self._descriptor, 0, self._num_bytes)
            return
        # Making room would be writing everything once more where there is no block device below, as a tmpfs is, and
        # copying what a clone shares.
        space = os.fstatvfs(self._descriptor)
        if space.f_bavail * space.f_frsize < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(self._descriptor, self._num_bytes)

    def _carry(self, offset: int, buffer: Buffer) -> None:
        try:
            self._put(offset, buffer)
        except BaseException as error:  # noqa: BLE001 - raised where the pass ends
            buffer.release()
            self._failed(error)
        else:
            self._hash(offset, buffer)

    def _hash(self, offset: int, buffer: Buffer) -> None:
        try:
            if self._arrivals.add(offset, buffer):
                self._finish()
        except BaseException as error:  # noqa: BLE001 - raised where the pass ends
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self._arrivals.close()
        self._on_error(error)

    def _read_back(self, target: torch.Tensor, offset: int) -> None:
        read_into(self._descriptor, self._path, target, offset)

    def _put(self, offset: int, buffer: Buffer) -> None:
        """Write bytes; the whole pages among them past the page cache."""
        data = buffer.data
        begin = -offset % PAGE_BYTES
        end = len(data) - (offset + len(data)) % PAGE_BYTES
        is_aligned = (buffer.values.data_ptr() + begin) % PAGE_BYTES == 0
        if self._past_cache < 0 or not is_aligned or end - begin < _DIRECT_BYTES:
            write_all(self._descriptor, self._path, data, offset)
            return
        # No page goes both ways, which would leave it to the kernel which one wins.
        write_all(self._descriptor, self._path, data[:begin], offset)
        try:
            write_all(self._past_cache, self._path, data[begin:end], offset + begin)
        except MergefleetError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EINVAL:
                raise
            # It wants larger pages than memory has: the same descriptor through the page cache.
            flags = fcntl.fcntl(self._past_cache, fcntl.F_GETFL)
            fcntl.fcntl(self._past_cache, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            write_all(self._past_cache, self._path, data[begin:end], offset + begin)
        write_all(self._descriptor, self._path, data[end:], offset + end)

    def _origin_is_as_it_was(self) -> bool:
        """Whether what was hashed and what was cloned are the same bytes; if not, the file is read again."""
        if not self.cloned:
            return True
        with file_errors(f"reading {self._origin}", self._origin):
            return FileState.of(self._origin.stat()) == self._origin_state

    def _finish(self) -> None:
        state = None
        if self._num_bytes >= _LARGE_BYTES and self._origin_is_as_it_was():
            time.sleep(_CLOCK_SECONDS)
            state = FileState.of(os.fstat(self._descriptor))
        # At once, since a pass of many jobs over many shards would run out of descriptors.
        self.close()
        self._on_closed(WrittenFile(self.name, self._num_bytes, self._arrivals.digest, state))
