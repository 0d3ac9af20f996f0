"""What is at a location now: names, sizes and bytes, of one version, wherever it is."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from jobs.errors import NotFoundError
from jobs.locations import HubRepo, LocalPath, Location, S3Prefix
from workers.files import file_errors, read_chunks


class Contents(Protocol):
    """The files at a location, as they were when it was opened. May be read by several threads."""

    sizes: Mapping[str, int]
    """Size in bytes of every file, by its name relative to the location."""

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file in order, a few MiB at a time.

        Raises:
            NotFoundError, AuthError, TransientIOError, BadInputError: by kind of fault.
        """
        ...


class LocalContents:
    """The files below a directory."""

    def __init__(self, location: LocalPath) -> None:
        self._directory = location.path
        with file_errors(f"reading {location}"):
            if not self._directory.is_dir():
                raise NotFoundError(f"{location} does not exist, or is no directory")
            self.sizes: Mapping[str, int] = {
                path.relative_to(self._directory).as_posix(): path.stat().st_size
                for parent, _, names in os.walk(self._directory, onerror=_raise)
                for path in (Path(parent, name) for name in names)
            }

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file."""
        with file_errors(f"reading {name}"):
            yield from read_chunks(self._directory / name)


class S3Contents:
    """The objects below a prefix."""

    def __init__(self, location: S3Prefix) -> None:
        from workers.s3_client import S3Store  # noqa: PLC0415 - loads boto3 only where there is S3

        self._store = S3Store(location)
        self._objects = self._store.objects()
        self.sizes: Mapping[str, int] = {name: entry.num_bytes for name, entry in self._objects.items()}

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of an object, of the version that was listed."""
        return self._store.read(self._objects[name])


class HubContents:
    """The files of a commit: the one that the revision meant when it was opened."""

    def __init__(self, location: HubRepo, scratch: Path) -> None:
        from workers.hub_client import HubStore  # noqa: PLC0415 - loads huggingface_hub only where there is a Hub

        self._store = HubStore(location)
        self._scratch = scratch
        commit = self._store.head()
        if commit is None:
            raise NotFoundError(f"{location} does not exist, or HF_TOKEN may not see it")
        self._commit = commit
        # The Hub keeps this file in every repository; it is nobody's content.
        self.sizes: Mapping[str, int] = {
            name: size for name, size in self._store.sizes(commit).items() if name != ".gitattributes"
        }

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file; it is fetched into a directory of its own first, and gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="fetch-") as directory:
            path = self._store.fetch(self._commit, name, Path(directory))
            with file_errors(f"reading {name}"):
                yield from read_chunks(path)


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
