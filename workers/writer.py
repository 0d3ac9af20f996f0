"""Shard files of one merged checkpoint: offsets known up front, written in any order, hashed on the way."""

import hashlib
import heapq
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import MergefleetError
from jobs.release import Artifact
from workers.checkpoint import CheckpointLayout, ShardLayout, TensorSpec
from workers.files import FileState, file_errors
from workers.tensor_io import copy_range, write_all

_HASH_BYTES = 4 << 20
"""Hashing follows the written part of a file in steps of about this size, small enough to find it in the caches."""
_CLOCK_SECONDS = 0.02
"""Longer than the clock that stamps files stands still."""


@dataclass(frozen=True, slots=True)
class HashedFile:
    """A finished file."""

    artifact: Artifact
    state: FileState | None
    """Of the file when its end was about to be hashed: any later write to it shows, where the file system keeps times
    finer than a fiftieth of a second. None for a small file, which is sooner read again than its times move on."""


class ShardWriter:
    """One output file, header included: all bytes come through `write` and `copy`.

    Its SHA-256 follows the frontier up to which everything is written, read back from the file.
    """

    def __init__(
        self, path: Path, layout: ShardLayout, hashing: Executor, on_closed: Callable[[HashedFile], None]
    ) -> None:
        self._path = path
        self._num_bytes = layout.num_bytes
        self._hashing = hashing
        self._on_closed = on_closed
        self._lock = threading.Lock()
        self._written: list[tuple[int, int]] = []
        self._frontier = 0
        self._num_hashed = 0
        self._hash_runs = False
        self._hashes: list[Future[None]] = []
        self._state: FileState | None = None
        self._sha256 = hashlib.sha256()
        with file_errors(f"making {path}"):
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
            try:
                # A full disk is found out before any work is done.
                os.posix_fallocate(self._descriptor, 0, self._num_bytes)
                self._mapped = mmap.mmap(self._descriptor, self._num_bytes, access=mmap.ACCESS_READ)
            except OSError:
                # Gone at once: another thread that wants the file meets the same fault, not a file that is in its way.
                path.unlink()
                os.close(self._descriptor)
                raise

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write bytes at an offset; every byte of the file is written exactly once.

        Raises:
            NoCapacityError: the disk is full.
        """
        write_all(self._descriptor, self._path, data, offset)
        self._advance(offset, offset + len(data))

    def copy(self, source: int, begin: int, target_begin: int, num_bytes: int) -> None:
        """Copy bytes from another file, inside the kernel where possible.

        Raises:
            NoCapacityError: the disk is full.
        """
        copy_range(source, self._descriptor, self._path, begin=begin, target_begin=target_begin, num_bytes=num_bytes)
        self._advance(target_begin, target_begin + num_bytes)

    def raise_faults(self) -> None:
        """Let faults of the hashing come up, once it has ended."""
        for hashed in self._hashes:
            hashed.result()

    def close(self) -> None:
        """Close the file, whole or not, once nobody writes or hashes any more. Idempotent."""
        if self._descriptor >= 0:
            self._mapped.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def _advance(self, begin: int, end: int) -> None:
        if begin == end:
            return  # an empty tensor: it may come when the file is finished already
        with self._lock:
            heapq.heappush(self._written, (begin, end))
            while self._written and self._written[0][0] <= self._frontier:
                self._frontier = max(self._frontier, heapq.heappop(self._written)[1])
            due = self._frontier - self._num_hashed >= _HASH_BYTES or self._frontier == self._num_bytes
            if due and not self._hash_runs:
                self._hash_runs = True
                self._hashes.append(self._hashing.submit(self._hash))

    def _hash(self) -> None:
        while True:
            with self._lock:
                begin, end = self._num_hashed, self._frontier
                if begin == end:
                    self._hash_runs = False
                    break
            if end == self._num_bytes > _HASH_BYTES:
                time.sleep(_CLOCK_SECONDS)
                self._state = FileState.of(os.fstat(self._descriptor))
            with memoryview(self._mapped)[begin:end] as view:
                self._sha256.update(view)
            with self._lock:
                self._num_hashed = end
        if end == self._num_bytes:
            digest = self._sha256.hexdigest()
            # At once, since a pass of many jobs over many shards would run out of descriptors.
            self.close()
            artifact = Artifact(path=self._path.name, num_bytes=self._num_bytes, sha256=digest)
            self._on_closed(HashedFile(artifact, self._state))


class CheckpointWriter:
    """All shards of one job. A file is opened when its first tensor comes, and finished with its last byte."""

    def __init__(
        self, directory: Path, layout: CheckpointLayout, hashing: Executor, on_file: Callable[[HashedFile], None]
    ) -> None:
        self._directory = directory
        self._layout = layout
        self._hashing = hashing
        self._on_file = on_file
        self._lock = threading.Lock()
        self._writers: dict[str, ShardWriter] = {}
        self._artifacts: list[Artifact] = []
        self.error: MergefleetError | None = None
        """The first thing that went wrong; the job is over with it."""

    def locate(self, name: str) -> tuple[ShardWriter, TensorSpec]:
        """Return the file a tensor is written to, and where in it.

        Raises:
            NoCapacityError: the disk is full.
        """
        shard, spec = self._layout.tensors[name]
        with self._lock:
            if shard.name not in self._writers:
                path = self._directory / shard.name
                self._writers[shard.name] = ShardWriter(path, shard, self._hashing, self._finished)
                self._writers[shard.name].write(0, shard.header)
            return self._writers[shard.name], spec

    def fail(self, error: MergefleetError) -> None:
        """Give the job up; the first error is kept."""
        with self._lock:
            self.error = self.error or error

    def finished(self) -> tuple[Artifact, ...]:
        """Return all files by name, once everything is written and hashed, if the job went well."""
        for writer in self._writers.values():
            writer.raise_faults()
        assert self.error or len(self._artifacts) == len(self._layout.shards)
        return tuple(sorted(self._artifacts, key=lambda artifact: artifact.path))

    def close(self) -> None:
        """Close all files, whole or not, once nobody writes or hashes any more. Idempotent."""
        for writer in self._writers.values():
            writer.close()

    def _finished(self, file: HashedFile) -> None:
        with self._lock:
            self._artifacts.append(file.artifact)
        try:
            self._on_file(file)
        except MergefleetError as error:
            self.fail(error)
