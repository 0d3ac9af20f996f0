"""Directories of this machine, as patterns of request files ask for them."""

import contextlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from jobs.errors import AuthError, NotFoundError, TransientIOError
from jobs.locations import LocalPath, Location
from jobs.text import shown


class LocalFolders:
    """A `Listing` of local places; asked for others, it says that they cannot be looked into from here."""

    def folders(self, place: Location) -> Collection[str]:
        """Return the names of the directories in a directory, those that links lead to included."""
        path = _path(place)
        with _errors(path):
            return [entry.name for entry in _entries(path) if entry.is_dir()]

    def files(self, place: Location) -> Mapping[str, int]:
        """Return names and sizes of the regular files in a directory; none where there is no such directory."""
        path = _path(place)
        with _errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return {entry.name: entry.stat().st_size for entry in _entries(path) if entry.is_file()}
        return {}

    def start(self, place: Location, name: str, num_bytes: int) -> bytes | None:
        """Return the first bytes of a regular file; nothing where it has become something else."""
        path = _path(place) / name
        with _errors(path), os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(num_bytes) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""


def _path(place: Location) -> Path:
    if not isinstance(place, LocalPath):
        raise NotFoundError(f"{place}: expected a directory, as stores are not looked into from here")
    return place.path


def _entries(path: Path) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return list(entries)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{shown(path)}: there is no such directory") from error
    except PermissionError as error:
        raise AuthError(f"{shown(path)}: this process may not read it") from error
    except OSError as error:
        raise TransientIOError(f"{shown(path)}: {error.strerror or error}") from error
