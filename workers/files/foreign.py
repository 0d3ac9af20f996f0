"""The one door for files that come from outside: bases, adapters and releases, wherever they lie.

A directory is the operator's word and is taken as it resolves. What lies below it is its author's: only regular files
are opened, no link leads out of the directory, no FIFO or device makes the opener wait, and what is read as a whole has
a size that its kind may have. The caches of huggingface_hub are made of links, `snapshots/<commit>/<file>` to
`blobs/<hash>`; such a link is followed where it stays within its repository.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import BadInputError, NotFoundError
from jobs.text import shown
from workers.files.local import CHUNK_BYTES, FileState, file_errors

_MIB = 1 << 20

_SMALL_BYTES = 128 * _MIB
"""Of any other file, which is read at once."""

_ADAPTER_BYTES = 64 << 30
"""Of an adapter's weights, which are read as a whole for their digest."""

_ADAPTERS = re.compile(r"adapter_model|adapter_\d+\.pt$|adapters\.safetensors$")
"""What PEFT, torchtune and MLX call them."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Never read as a whole: their readers check what they say of themselves, and take a part at a time."""

_MOST_BYTES = (
    (".index.json", 64 * _MIB),
    ("tokenizer.json", 128 * _MIB),
    ("vocab.json", 64 * _MIB),
    ("added_tokens.json", 64 * _MIB),
    (".json", 16 * _MIB),
    (".jinja", _MIB),
    (".model", 64 * _MIB),
    (".spm", 64 * _MIB),
    (".tiktoken", 64 * _MIB),
    ("vocab.txt", 64 * _MIB),
    ("merges.txt", 64 * _MIB),
    ("unigrams.txt", 64 * _MIB),
    (".ttf", 64 * _MIB),
    (".ttc", 64 * _MIB),
    (".otf", 64 * _MIB),
    ("", 16 * _MIB),
)
"""Largest files by the end of their names; the first that fits counts (docs/bounds.md)."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024
"""What the specification of git-lfs allows."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

_LINK_ERRORS = (errno.ELOOP, errno.ENOTDIR)
"""What opening without following links says of a link: to a file, or where a directory was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFile:
    """A file from outside, open for reading."""

    path: Path
    """As it was asked for."""
    descriptor: int
    state: FileState
    """As it was when it was opened: what is read through the descriptor is this file while its state stays."""

    def changed(self) -> bool:
        """Return whether the file was written to since it was opened."""
        return FileState.of(os.fstat(self.descriptor)) != self.state

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def open_foreign(path: Path, *, num_parts: int = 1, any_size: bool = False) -> ForeignFile:
    """Open a file from outside for reading. The caller closes it.

    Args:
        path: `<directory>/<name>`.
        num_parts: how many components at the end of the path are its author's; those before are the operator's.
        any_size: whether it is of the weights, whose reader takes a part at a time.

    Raises:
        NotFoundError: it is not there.
        BadInputError: it is no regular file, a link leads out of its directory, it is larger than its kind may be, or
            it is what git-lfs leaves in the place of a file.
        AuthError, TransientIOError: it cannot be read, by kind of fault.
    """
    try:
        with file_errors(f"reading {shown(path)}", path):
            descriptor = _open(path, num_parts)
    except NotFoundError as error:
        raise NotFoundError(f"{shown(path)}: expected this file, found nothing; is the directory complete?") from error
    try:
        status = os.fstat(descriptor)
        _check_kind(path, status)
        if not any_size or _ADAPTERS.match(path.name):
            _check_size(path, status)
        _check_content(path, descriptor, status)
    except BaseException:
        os.close(descriptor)
        raise
    return ForeignFile(path=path, descriptor=descriptor, state=FileState.of(status))


@contextlib.contextmanager
def foreign_file(path: Path, *, num_parts: int = 1, any_size: bool = False) -> Iterator[io.BufferedReader]:
    """Open a file from outside as `open_foreign` does, and hand it out as a binary file."""
    file = open_foreign(path, num_parts=num_parts, any_size=any_size)
    with os.fdopen(file.descriptor, "rb") as opened:
        yield opened


def read_foreign(path: Path, *, num_parts: int = 1) -> bytes:
    """Return the bytes of a small file from outside; raises as `open_foreign`."""
    most = min(_most_bytes(path.name) or _SMALL_BYTES, _SMALL_BYTES)
    with foreign_file(path, num_parts=num_parts) as file, file_errors(f"reading {shown(path)}", path):
        content = file.read(most + 1)
    if len(content) > most:  # it has grown since it was opened
        raise _too_large(path, len(content), most)
    return content


def copy_foreign(path: Path, target: Path, *, num_parts: int = 1) -> str:
    """Copy a file from outside to a new file; raises as `open_foreign`.

    Returns:
        The SHA-256 of the bytes that were copied, in hexadecimal.
    """
    digest = hashlib.sha256()
    most = _most_bytes(path.name)
    num_bytes = 0
    with foreign_file(path, num_parts=num_parts) as file, target.open("wb") as copy:
        while chunk := file.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            if most is not None and num_bytes > most:
                raise _too_large(path, num_bytes, most)
            digest.update(chunk)
            copy.write(chunk)
    return digest.hexdigest()


def foreign_sha256(path: Path, *, num_parts: int = 1) -> str:
    """Return the SHA-256 of a file from outside in hexadecimal; raises as `open_foreign`."""
    with foreign_file(path, num_parts=num_parts) as file, file_errors(f"reading {shown(path)}", path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inside(folder: Path, *, num_parts: int = 1) -> None:
    """Check that a folder, where there is one, lies in its directory, with the links on the way followed.

    Args:
        folder: `<directory>/<name>`.
        num_parts: how many components at the end of the path are its author's.

    Raises:
        BadInputError: a link leads out of the directory, or in a circle.
    """
    if os.path.lexists(folder):
        with file_errors(f"reading {shown(folder)}", folder):
            _place(folder, num_parts, "folder")


def _place(path: Path, num_parts: int, what: str = "file") -> tuple[Path, tuple[str, ...]]:
    """Return a directory without links on the way to it, and the names below it that lead to a file.

    Raises:
        BadInputError: the file lies elsewhere.
        OSError: a part of the path is not there, or cannot be looked at.
    """
    root = path.parents[num_parts - 1]
    real_root = Path(os.path.realpath(root, strict=True))
    real = Path(os.path.realpath(path, strict=True))
    if real.is_relative_to(real_root):
        return real_root, real.relative_to(real_root).parts
    blobs = _hub_blobs(real_root)
    if blobs is not None and real.parent == blobs:
        return blobs, (real.name,)
    raise BadInputError(
        f"{shown(path)}: expected a {what} of this directory, found a link to {shown(real)}; a link that leads out of "
        f"the directory is not followed: put the {what} itself there, or name the directory that holds it"
    )


def _hub_blobs(directory: Path) -> Path | None:
    """Return where huggingface_hub keeps the files of a snapshot; None for any other directory."""
    for snapshot in (directory, *directory.parents):
        if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
            return snapshot.parent.parent / "blobs"
    return None


def _open(path: Path, num_parts: int) -> int:
    # Most files are no links, and lie where their path says: where that is so, nothing has to be resolved.
    parts = path.parts[-num_parts:]
    if ".." not in parts:
        try:
            # The directory itself may be a link, which is the operator's.
            return _open_below(path, f"{path.parents[num_parts - 1]}/.", parts)
        except OSError as error:
            if error.errno not in _LINK_ERRORS:
                raise
    try:
        return _open_below(path, *_place(path, num_parts))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadInputError(f"{shown(path)}: it became a link while it was opened") from error
        raise


def _open_below(path: Path, directory: str | Path, parts: tuple[str, ...]) -> int:
    """Open a file below a directory; raise one of `_LINK_ERRORS` where a component of the way is a link."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    parent = os.open(directory, flags | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            child = os.open(part, flags | os.O_DIRECTORY, dir_fd=parent)
            os.close(parent)
            parent = child
        name = parts[-1] if parts else "."
        # A device may act on being opened, so that it is looked at first; what is there then is looked at once more.
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        _check_kind(path, status)
        return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=parent)
    finally:
        os.close(parent)


def _check_kind(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise BadInputError(f"{shown(path)}: expected a regular file, found {kind}")


def _check_size(path: Path, status: os.stat_result) -> None:
    most = _most_bytes(path.name)
    if most is not None and status.st_size > most:
        raise _too_large(path, status.st_size, most)


def _check_content(path: Path, descriptor: int, status: os.stat_result) -> None:
    if status.st_size <= _MAX_POINTER_BYTES and os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER:
        raise BadInputError(
            f"{shown(path)}: expected this file, found a pointer of git-lfs to it; run git lfs pull in the clone"
        )


def _most_bytes(name: str) -> int | None:
    """Return how large a file may be; None where it is never read as a whole."""
    if name.endswith(_WEIGHTS):
        return _ADAPTER_BYTES if _ADAPTERS.match(name) else None
    return next(most for suffix, most in _MOST_BYTES if name.endswith(suffix))


def _too_large(path: Path, num_bytes: int, most: int) -> BadInputError:
    return BadInputError(f"{shown(path)}: expected a file of at most {most} bytes, found {num_bytes}")
