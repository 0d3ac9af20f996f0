"""What is at a location now: names, sizes and bytes, of one version, wherever it is."""

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from jobs.errors import BadInputError, NotFoundError
from jobs.locations import HubRepo, LocalPath, Location, S3Prefix
from workers.files.local import CHUNK_BYTES, file_errors, read_chunks
from workers.sources.belongings import CARD_NAME


class Contents(Protocol):
    """The files at a location, as they were when it was opened. May be read by several threads."""

    sizes: Mapping[str, int]
    """Size in bytes of every file, by its name relative to the location."""

    beside: frozenset[str]
    """Names that may stand there without being of a release."""
    oddities: Mapping[str, str]
    """What else is there and has no place in a release, by name: links, FIFOs, directories with nothing in them."""

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file in order, a few MiB at a time.

        Raises:
            NotFoundError, AuthError, TransientIOError, BadInputError: by kind of fault.
        """
        ...

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file, or all where it has fewer; no more than those travel.

        Raises:
            As `read`.
        """
        ...


class LocalContents:
    """The files below a directory."""

    beside: frozenset[str] = frozenset()

    def __init__(self, location: LocalPath) -> None:
        self._directory = location.path
        sizes: dict[str, int] = {}
        oddities: dict[str, str] = {}
        with file_errors(f"reading {location}"):
            if not self._directory.is_dir():
                raise NotFoundError(f"{location} does not exist, or is no directory")
            for parent, directories, names in os.walk(self._directory, onerror=_raise):
                if not (directories or names or Path(parent) == self._directory):
                    oddities[self._name(parent)] = "is an empty directory, which no release holds"
                for path in (Path(parent, name) for name in (*directories, *names)):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        sizes[self._name(path)] = status.st_size
                    elif not stat.S_ISDIR(status.st_mode):
                        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "a FIFO, a socket or a device"
                        oddities[self._name(path)] = f"is {kind}, expected a regular file"
        self.sizes: Mapping[str, int] = sizes
        self.oddities: Mapping[str, str] = oddities

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file. What has become a link or a FIFO by now is neither followed nor waited for."""
        path = self._directory / name
        with file_errors(f"reading {name}"):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise BadInputError(f"{path} is no regular file")
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file."""
        return next(self.read(name), b"")[:num_bytes]

    def _name(self, path: str | Path) -> str:
        return Path(path).relative_to(self._directory).as_posix()


class S3Contents:
    """The objects below a prefix."""

    beside: frozenset[str] = frozenset()

    def __init__(self, location: S3Prefix) -> None:
        from workers.sources.s3_client import S3Store  # noqa: PLC0415 - loads boto3 only where there is S3

        self._store = S3Store(location)
        self._objects = self._store.objects()
        self.sizes: Mapping[str, int] = {name: entry.num_bytes for name, entry in self._objects.items()}
        self.oddities: Mapping[str, str] = {}

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of an object, of the version that was listed."""
        return self._store.read(self._objects[name])

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of an object, of the version that was listed."""
        return self._store.read_start(self._objects[name], num_bytes)


class HubContents:
    """The files of a commit: the one that the revision meant when it was opened."""

    beside: frozenset[str] = frozenset({CARD_NAME})

    def __init__(self, location: HubRepo, scratch: Path) -> None:
        from workers.sources.hub_client import HubStore  # noqa: PLC0415 - loads huggingface_hub only where there is a Hub

        self._store = HubStore(location)
        self._scratch = scratch
        commit = self._store.head()
        if commit is None:
            raise NotFoundError(f"{location} does not exist, or HF_TOKEN may not see it")
        self._commit = commit
        # The Hub keeps this file in every repository; it is no content.
        self.sizes: Mapping[str, int] = {
            name: size for name, size in self._store.sizes(commit).items() if name != ".gitattributes"
        }
        self.oddities: Mapping[str, str] = {}

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file; it is fetched into a directory of its own first, and gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="fetch-") as directory:
            path = self._store.fetch(self._commit, name, Path(directory))
            with file_errors(f"reading {name}"):
                yield from read_chunks(path)

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file of the commit."""
        return self._store.read_start(self._commit, name, num_bytes)


def open_contents(location: Location, scratch: Path) -> Contents:
    """Look at a location.

    Args:
        location: a directory, prefix or repository.
        scratch: existing directory for files on their way from a Hub.

    Raises:
        NotFoundError: there is no such directory, bucket, repository or revision.
        AuthError, TransientIOError, BadInputError: by kind of fault.
    """
    match location:
        case LocalPath():
            return LocalContents(location)
        case S3Prefix():
            return S3Contents(location)
        case HubRepo():
            return HubContents(location, scratch)


def _raise(error: OSError) -> None:
    raise error
