"""Records in the directory of a staging, beside the files they are of."""

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from jobs.release import Artifact
from workers.files.local import FileState, file_errors
from workers.files.scratch import OwnedDirectory, sweep
from workers.releases.records import MAX_RECORD_BYTES, ShardRecord, decode_record, encode_record
from workers.releases.sinks import Receipt

_log = logging.getLogger(__name__)

RECORDS_DIRECTORY = ".shards"
"""No file of a release has such a name: those begin with a letter or a digit."""


class LocalRecords:
    """Records of shards that lie in a staging's directory."""

    def __init__(
        self,
        directory: Path,
        merge_key: str,
        *,
        take: Callable[[Artifact], Receipt | None],
        drop: Callable[[str], None],
    ) -> None:
        """Start without any.

        Args:
            directory: of the staging.
            merge_key: of the release.
            take: takes over a file, as `Records.claim` does.
            drop: forgets a file that was taken over.
        """
        self._directory = directory
        self._merge_key = merge_key
        self._take = take
        self._drop = drop
        self._gathered: dict[str, ShardRecord] = {}
        self._is_used = False

    def let_go(self, owned: OwnedDirectory, *, keep: bool) -> bool:
        """Let go of the directory, which stays where something was left that no one has claimed or cleared.

        Args:
            owned: the directory.
            keep: whether it stays for any record in it, its own or those of others.

        Returns:
            Whether it stays.
        """
        stays = (bool(self._gathered) and not self._is_used) or (keep and has_records(self._directory))
        if stays:
            owned.abandon()
        else:
            owned.leave()
        return stays

    def gather(self, dead: Path) -> None:
        """Move recorded shards of this release here from the directory of a dead staging.

        Files are looked at no further than that they can be what they are recorded to be, and are this user's: in a
        directory for all, others could leave records of what they like.
        """
        owner = self._directory.stat().st_uid
        if dead.lstat().st_uid != owner:
            return
        for path in sorted(_records_of(dead)):
            data = _read(path) or b""
            record = decode_record(data, self._merge_key)
            if record is None or "/" in record.artifact.path or record.artifact.path in self._gathered:
                continue
            name = record.artifact.path
            try:
                status = (dead / name).lstat()
                is_file = stat.S_ISREG(status.st_mode) and status.st_uid == owner
                if is_file and status.st_size == record.artifact.num_bytes:
                    (dead / name).rename(self._directory / name)
                    self._write(name, data)
                    self._gathered[name] = record
            except FileNotFoundError:
                continue
            except OSError:
                _log.warning("a finished shard could not be moved", extra={"file": str(dead / name)}, exc_info=True)

    def keep(self, record: ShardRecord) -> None:
        """Write a record. Without a sync: what a power cut takes from it, its digest tells."""
        path = record.artifact.path
        with file_errors(f"recording {path} in {self._directory}", self._directory):
            self._write(path, encode_record(record))

    def left(self) -> tuple[ShardRecord, ...]:
        """Return what was gathered."""
        return tuple(self._gathered.values())

    def claim(self, record: ShardRecord, *, whole: bool) -> Receipt | None:  # noqa: ARG002 - the file is here in any case
        """Take over a file that has the bytes of its record."""
        self._is_used = True
        return self._take(record.artifact)

    def has(self, artifact: Artifact) -> bool:
        """Whether the file of an artifact is here, read and hashed now."""
        return verified_state(self._directory / artifact.path, artifact) is not None

    def clear(self, besides: Collection[str] = ()) -> None:
        """Remove what was gathered, but some files."""
        self._is_used = True
        for name in self._gathered.keys() - set(besides):
            self._drop(name)
            with file_errors(f"clearing {self._directory}", self._directory):
                (self._directory / name).unlink(missing_ok=True)
                self._record_path(name).unlink(missing_ok=True)
            del self._gathered[name]

    def _write(self, name: str, data: bytes) -> None:
        path = self._record_path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    def _record_path(self, name: str) -> Path:
        return self._directory / RECORDS_DIRECTORY / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def has_records(directory: Path) -> bool:
    """Whether the directory of a staging has records of finished shards."""
    return bool(_records_of(directory))


def sweep_unused(parent: Path, prefix: str, *, over: bool, unused: str | None = None) -> bool:
    """Remove the directories of dead stagings whose finished shards no later attempt will use.

    Args:
        parent: as `sweep` takes it.
        prefix: as `sweep` takes it.
        over: whether there is no later attempt.
        unused: name of a directory that is of no use in any case.

    Returns:
        Whether none was left.
    """
    left = []

    def spare(directory: Path) -> bool:
        is_of_use = not over and directory.name != unused and has_records(directory)
        if is_of_use:
            left.append(directory)
        return is_of_use

    sweep(parent, prefix, spare=spare)
    return not left


def verified_state(path: Path, artifact: Artifact) -> FileState | None:
    """Read and hash a file; return the state it has, or None where it is not what an artifact says, or not there."""
    with file_errors(f"reading {path}", path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode) or before.st_size != artifact.num_bytes:
                return None
            if hashlib.file_digest(file, "sha256").hexdigest() != artifact.sha256:
                return None
            state = FileState.of(os.fstat(descriptor))
            return state if state == FileState.of(before) else None


def _records_of(directory: Path) -> list[Path]:
    records = directory / RECORDS_DIRECTORY
    # The name may be a link: what lies behind it is not this staging's.
    return list(records.glob("*.json")) if records.is_dir() and not records.is_symlink() else []


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_RECORD_BYTES + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
