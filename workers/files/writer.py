"""All shard files of one merged checkpoint: opened with their first bytes, finished with their last."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from jobs.errors import MergefleetError
from workers.files.conveyor import Conveyor
from workers.files.layout import CheckpointLayout, TensorSpec
from workers.files.shard import Origin, ShardWriter, WrittenFile


class CheckpointWriter:
    """All shards of one job. A file is opened when its first tensor comes, and finished with its last byte."""

    def __init__(
        self,
        directory: Path,
        layout: CheckpointLayout,
        conveyor: Conveyor,
        *,
        direct: bool,
        on_file: Callable[[WrittenFile], None] | None,
        origin: Origin | None = None,
    ) -> None:
        """Start without files.

        Args:
            directory: where they will be.
            layout: what they will be.
            conveyor: what takes the bytes there.
            direct: whether they go past the page cache, since they are not read again here.
            on_file: told each file as it is closed; an error of ours fails the job. None where they are for this
                process alone: they are not hashed.
            origin: has some of the bytes already.
        """
        self._directory = directory
        self._layout = layout
        self._conveyor = conveyor
        self._direct = direct
        self._on_file = on_file
        self._origin = origin
        self._lock = threading.Lock()
        self._writers: dict[str, ShardWriter] = {}
        self._files: list[WrittenFile] = []
        self._fault: BaseException | None = None
        self.error: MergefleetError | None = None
        """The first thing that went wrong; the job is over with it."""

    def locate(self, name: str) -> tuple[ShardWriter, TensorSpec]:
        """Return the file a tensor is written to, and where in it.

        Raises:
            NoCapacityError: the disk is full.
        """
        shard, spec = self._layout.tensors[name]
        with self._lock:
            writer = self._writers.get(shard.name)
            is_new = writer is None
            if writer is None:
                writer = self._writers[shard.name] = ShardWriter(
                    self._directory / shard.name,
                    shard,
                    self._conveyor,
                    direct=self._direct,
                    hashed=self._on_file is not None,
                    origin=self._origin,
                    on_closed=self._finished,
                    on_error=self._failed,
                )
        if is_new:
            writer.write_copy(0, torch.frombuffer(bytearray(shard.header), dtype=torch.uint8))
        return writer, spec

    @property
    def over(self) -> bool:
        """Whether there is no use in going on: the job has failed, or the pass will."""
        return self.error is not None or self._fault is not None

    def fail(self, error: MergefleetError) -> None:
        """Give the job up; the first error is kept."""
        with self._lock:
            self.error = self.error or error

    def raise_error(self) -> None:
        """Let come up what went wrong."""
        if self._fault is not None:
            raise self._fault
        if self.error is not None:
            raise self.error

    def finished(self) -> tuple[WrittenFile, ...]:
        """Return all files by name, once everything is written and hashed, if the job went well."""
        if self._fault is not None:
            raise self._fault
        assert self.error or len(self._files) == len(self._layout.shards)
        return tuple(sorted(self._files, key=lambda file: file.name))

    def close(self) -> None:
        """Close all files, whole or not, once no thread writes or hashes any more. Idempotent."""
        for writer in self._writers.values():
            writer.close()

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, MergefleetError):
            self.fail(error)
        else:
            self._fault = self._fault or error

    def _finished(self, file: WrittenFile) -> None:
        with self._lock:
            self._files.append(file)
        if self._on_file is not None:
            self._on_file(file)
