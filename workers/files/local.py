"""Local files: digests, durable writes, and what an errno means."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jobs.errors import AuthError, BadInputError, MergefleetError, NoCapacityError, NotFoundError, TransientIOError
from jobs.places import file_place

CHUNK_BYTES = 8 << 20
"""How much of a file is in memory at a time."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM})
_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EHOSTDOWN,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENODEV,
        errno.ENOTCONN,
        errno.EROFS,  # a file system that found itself damaged, or is being moved, is mounted anew
        errno.ESHUTDOWN,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EUCLEAN,
    }
)


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes with every write to a file, if the clock that stamps files has moved on since the last one."""

    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the state that stat(2) tells."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextlib.contextmanager
def file_errors(doing: str, path: Path | None = None) -> Iterator[None]:
    """Turn an OSError of local files into the error that says what can be done about it.

    Args:
        doing: what is being done to what, for the message: "reading adapter /data/a".
        path: where, for errors that name no file, as those of an open file do: the file system is at fault.

    Raises:
        NotFoundError, AuthError, NoCapacityError, TransientIOError, BadInputError: by errno.
    """
    try:
        yield
    except OSError as error:
        raise translate_os_error(error, doing, path) from error


def translate_os_error(error: OSError, doing: str, path: Path | None = None) -> MergefleetError:
    """Return our error for an OSError of local files, by errno; it names the file system where that is at fault.

    Args:
        error: as it came.
        doing: what was being done to what.
        path: where, should the error not say.
    """
    where = f"{doing}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if isinstance(error, FileNotFoundError):  # some libraries raise it without an errno
        return NotFoundError(where)
    if error.errno in _DENIED:
        return AuthError(f"{where}; give this process permission, or choose another place").at(_place_of(error, path))
    if error.errno in _FULL:
        return NoCapacityError(f"{where}; free some space").at(_place_of(error, path))
    if error.errno in _PASSING:
        return TransientIOError(where).at(_place_of(error, path))
    return BadInputError(where)


def is_of_the_place(error: OSError) -> bool:
    """Whether an error is that of a file system or a machine, and not of what was asked of it."""
    return error.errno in _FULL | _PASSING


def _place_of(error: OSError, path: Path | None) -> str | None:
    """Return the file system that an error is about, by where it is mounted; None where no file is named."""
    name = error.filename2 or error.filename or path
    return file_place(mount_point(Path(os.fsdecode(name)))) if isinstance(name, str | bytes | os.PathLike) else None


def mount_point(path: Path) -> Path:
    """Return the directory that the file system of a path is mounted at; what cannot be looked at counts as a part."""
    path = path.absolute()
    while not os.path.ismount(path) and path != path.parent:
        path = path.parent
    return path


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, `CHUNK_BYTES` at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make every file and name below a directory, and the directory itself, survive a power cut."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
