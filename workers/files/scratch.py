"""Directories that belong to live processes. When all of them have died, the next one to come sweeps what they left.

Life is a lock, not a guess: each directory has a lock file beside it that its owners share with flock(2), which the
kernel lets go of however they end; a sweeper wants it for itself. A lock file is an owner's only once it is locked and
still has its name: until then a sweeper may have taken it for a dead one, and the owner starts over under another name.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from workers.files.local import sync_tree

_log = logging.getLogger(__name__)

_LOCK_SUFFIX = ".lock"
_NUM_RANDOM_BYTES = 8


class OwnedDirectory:
    """A directory `<parent>/<prefix><random>`, locked for as long as an owner lives that has not left it.

    Its maker is its first owner; others that know its path can join.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, parent: Path, prefix: str) -> Self:
        """Make a fresh one."""
        parent.mkdir(parents=True, exist_ok=True)
        while (lock := _new_lock(path := parent / f"{prefix}{secrets.token_hex(_NUM_RANDOM_BYTES)}")) is None:
            pass
        made = cls(path, lock)
        try:
            path.mkdir()
        except OSError:
            made.leave()
            raise
        return made

    @classmethod
    def join(cls, path: Path) -> Self | None:
        """Become one more owner of a directory; None when this process does not see it, or it was swept."""
        try:
            lock = os.open(_lock_path(path), os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if _try_lock(lock, fcntl.LOCK_SH) and path.is_dir():
            return cls(path, lock)
        os.close(lock)
        return None

    def leave(self) -> None:
        """Let go of the directory; the last holder removes it, or what is left of it. Idempotent."""
        if self._lock < 0:
            return
        if _try_lock(self._lock, fcntl.LOCK_EX):
            _remove(self.path)
        os.close(self._lock)
        self._lock = -1

    def abandon(self) -> None:
        """Let go of the directory as a process does that dies: it stays for the next one to sweep. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep(
    parent: Path,
    prefix: str | None = None,
    *,
    spare: Callable[[Path], bool] = lambda _: False,
    gather: Callable[[Path], None] = lambda _: None,
) -> list[Path]:
    """Remove the directories below `parent` whose owners are dead.

    Args:
        parent: where owned directories are made; may be missing.
        prefix: only directories made with exactly this prefix are looked at; None for any.
        spare: says of a directory of the dead whether it stays.
        gather: takes what is of use out of a directory that is about to be removed. Nobody else looks at it meanwhile.

    Returns:
        The directories removed.
    """
    first = ".*" if prefix is None else re.escape(prefix)
    name = re.compile(rf"{first}[0-9a-f]{{{2 * _NUM_RANDOM_BYTES}}}{re.escape(_LOCK_SUFFIX)}")
    removed = []
    for lock_path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if not name.fullmatch(lock_path.name):
            continue
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # swept by another process just now, or another user's to sweep
        try:
            directory = lock_path.with_name(lock_path.name.removesuffix(_LOCK_SUFFIX))
            if _try_lock(lock, fcntl.LOCK_EX) and not spare(directory):
                gather(directory)
                if _remove(directory):
                    removed.append(directory)
        finally:
            os.close(lock)
    return removed


@contextlib.contextmanager
def exclusive(lock_path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that one process (and one thread) at a time can hold.

    Args:
        lock_path: the lock file; made when missing, never removed, so that all waiters mean the same file.
        wait: for it to be free; it is held then in any case.

    Yields:
        Whether it is held.
    """
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def keep_directory(directory: Path, fill: Callable[[Path], None]) -> None:
    """Make a directory that stays, unless it is there: whole or not at all, and once, however many ask for it.

    Args:
        directory: becomes visible when it is whole and on disk.
        fill: writes into the directory it is given; what it raises is passed on, and nothing stays.
    """
    if directory.is_dir():
        return
    with exclusive(directory.with_name(f"{directory.name}{_LOCK_SUFFIX}")):
        if directory.is_dir():
            return  # another process has made it while this one waited
        sweep(directory.parent, f"{directory.name}.part-")
        owned = OwnedDirectory.make(directory.parent, f"{directory.name}.part-")
        try:
            fill(owned.path)
            sync_tree(owned.path)
            owned.path.rename(directory)
        finally:
            owned.leave()


def _new_lock(directory: Path) -> int | None:
    lock = os.open(_lock_path(directory), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    if _try_lock(lock, fcntl.LOCK_SH):
        return lock
    os.close(lock)
    return None


def _try_lock(lock: int, kind: int) -> bool:
    """Lock an open lock file; False when others hold it in a way that excludes this, or have removed it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(lock).st_nlink > 0


def _remove(directory: Path) -> bool:
    """Remove a directory, then its lock file. What cannot be removed keeps its lock file, for a later sweep."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        _log.warning("directory could not be removed", extra={"directory": str(directory)})
        return False
    _lock_path(directory).unlink(missing_ok=True)
    return True


def _lock_path(directory: Path) -> Path:
    return directory.with_name(directory.name + _LOCK_SUFFIX)
