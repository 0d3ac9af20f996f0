"""What files there are at a place: in a directory, or in a listing of a store."""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jobs.errors import BadInputError
from jobs.text import shown
from workers.files.foreign import check_inside, read_foreign
from workers.files.local import file_errors

_MAX_FILES_OF_FOLDER = 1000
MAX_DESCRIPTION_BYTES = 16 << 20
"""Largest file that is read to find what else belongs to a model."""


class Files(Protocol):
    """The files at a place: names, and the bytes of the few small ones that say what belongs together."""

    @property
    def place(self) -> object:
        """Where they are, for messages."""
        ...

    def top(self) -> Collection[str]:
        """Return the names of the files at the top."""
        ...

    def folders(self) -> Collection[str]:
        """Return the names of the folders at the top."""
        ...

    def below(self, folder: str) -> Collection[str]:
        """Return the files in a folder and below, named from the top."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a file, named from the top."""
        ...

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, which has at most `MAX_DESCRIPTION_BYTES`.

        Raises:
            BadInputError: it is larger.
        """
        ...


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of a directory: all that is no directory, and no link to one.

    Links count, as the Hub's cache has them for files. What cannot be opened counts, too: a link to nothing, a FIFO.
    The door (`files/foreign.py`) refuses it by name, where a file that seems not to be there would be missed in
    silence. A folder that a link puts elsewhere is refused as well.
    """

    place: Path

    def top(self) -> Collection[str]:
        """Return the names of the files at the top."""
        return [entry.name for entry in self._entries() if not entry.is_dir()]

    def folders(self) -> Collection[str]:
        """Return the names of the folders at the top."""
        return [entry.name for entry in self._entries() if entry.is_dir()]

    def below(self, folder: str) -> Collection[str]:
        """Return the files in a folder and below, named from the top."""
        top = self.place / folder
        check_inside(top, num_parts=folder.count("/") + 1)
        found = (path for parent, inner, names in os.walk(top) for path in _entries(Path(parent), inner, names))
        paths = list(itertools.islice(found, _MAX_FILES_OF_FOLDER + 1))
        if len(paths) > _MAX_FILES_OF_FOLDER:
            raise BadInputError(
                f"{top}: expected at most {_MAX_FILES_OF_FOLDER} files in a folder of a model, found more"
            )
        return [path.relative_to(self.place).as_posix() for path in paths if not path.is_dir()]

    def has(self, name: str) -> bool:
        """Whether there is a file, named from the top."""
        path = self.place / name
        return os.path.lexists(path) and not path.is_dir()

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file."""
        return read_foreign(self.place / name, num_parts=name.count("/") + 1)

    def _entries(self) -> list[os.DirEntry[str]]:
        with file_errors(f"reading {self.place}"), os.scandir(self.place) as entries:
            return list(entries)


@dataclass(frozen=True, slots=True)
class ListedFiles:
    """Files whose names are known from a listing."""

    place: object
    names: frozenset[str]
    reader: Callable[[str], bytes]

    def top(self) -> Collection[str]:
        """Return the names of the files at the top."""
        return [name for name in self.names if "/" not in name]

    def folders(self) -> Collection[str]:
        """Return the names of the folders at the top."""
        return {name.partition("/")[0] for name in self.names if "/" in name}

    def below(self, folder: str) -> Collection[str]:
        """Return the files in a folder and below, named from the top."""
        return [name for name in self.names if name.startswith(f"{folder}/")]

    def has(self, name: str) -> bool:
        """Whether there is a file, named from the top."""
        return name in self.names

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file."""
        return self.reader(name)


def check_description(name: object, num_bytes: int) -> None:
    """Check the size of a file that says what belongs together.

    Raises:
        BadInputError: it is none of those.
    """
    if num_bytes > MAX_DESCRIPTION_BYTES:
        raise BadInputError(f"{name}: expected at most {MAX_DESCRIPTION_BYTES} bytes, found {num_bytes}")


def _entries(parent: Path, folders: Iterable[str], names: Iterable[str]) -> Iterator[Path]:
    """Yield the files of a folder; a folder in it that is a link is refused, as no walk follows it."""
    for name in folders:
        if (parent / name).is_symlink():
            raise BadInputError(
                f"{shown(parent / name)}: expected a folder, found a link to one; put the folder itself there"
            )
    yield from (parent / name for name in names)
