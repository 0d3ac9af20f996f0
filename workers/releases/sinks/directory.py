"""Releases in a directory: built beside it under a hidden name, made visible by one rename."""

import errno
import itertools
import logging
import os
import shutil
from pathlib import Path

from jobs.errors import BadInputError, DestinationOccupiedError, InternalError, TransientIOError
from jobs.locations import LocalPath
from jobs.release import MANIFEST_NAME, Artifact, Manifest, Release
from workers.files.local import FileState, file_errors, sync, sync_tree
from workers.files.scratch import OwnedDirectory, sweep
from workers.releases.occupied import holds_below, is_taken, lies_inside, occupied
from workers.releases.released import (
    ManifestFile,
    check_all_put,
    check_artifact,
    decode_existing,
    encode_manifest,
    is_release,
    read_manifest,
)
from workers.releases.sinks import Receipt, Ticket
from workers.releases.sinks.local_records import RECORDS_DIRECTORY, LocalRecords, sweep_unused, verified_state

_log = logging.getLogger(__name__)

_MAX_DIRECTORIES = 10_000
"""Looked at to name the release that is in the way; a destination that is not empty is refused in any case."""
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


class DirectorySink:
    """A directory that does not exist yet, or is empty."""

    def __init__(self, location: LocalPath) -> None:
        self._location = location

    def existing(self) -> Manifest | None:
        """Return the manifest of the release that is there, or None when the directory is missing or empty."""
        found = _find(self._location)
        return None if found is None else found.manifest

    def open(self, merge_key: str) -> "DirectoryStaging":
        """Start a release in a hidden directory beside the destination, on the same filesystem.

        Raises:
            DestinationOccupiedError: the destination lies inside of a release, or holds something else than one.
            BadInputError: it is a mount point, which no rename replaces.
        """
        destination = _real(self._location)
        _refuse_above(self._location, destination)
        _find(self._location)
        if destination.is_mount():
            raise BadInputError(
                f"{self._location} is a mount point, in whose place no directory can be renamed; "
                "choose a directory below it"
            )
        with file_errors(f"making a staging directory for {self._location}", self._location.path):
            staging = DirectoryStaging(self._location, merge_key, OwnedDirectory.make(destination.parent, self._prefix))
            try:
                sweep(destination.parent, self._prefix, gather=staging.records.gather)
            except OSError:
                staging.discard()
                raise
        return staging

    def join(self, ticket: Ticket) -> "DirectoryStaging | None":
        """Write into the same hidden directory, where this process sees it."""
        with file_errors(f"joining the staging directory of {self._location}", self._location.path):
            owned = OwnedDirectory.join(ticket.directory)
        return None if owned is None else DirectoryStaging(self._location, ticket.merge_key, owned)

    def clear(self, attempt: str | None, *, unused: bool) -> bool:
        """Remove the hidden directories of the dead, but those with finished shards while nothing is published."""
        with file_errors(f"clearing what dead attempts left beside {self._location}", self._location.path):
            is_over = is_taken(lambda: _find(self._location))
            parent = _real(self._location).parent
            return sweep_unused(parent, self._prefix, over=is_over, unused=attempt if unused else None)

    @property
    def _prefix(self) -> str:
        return f".{_real(self._location).name}.staging-"


class DirectoryStaging:
    """A hidden directory beside the destination."""

    in_place = True

    def __init__(self, location: LocalPath, merge_key: str, owned: OwnedDirectory) -> None:
        self._location = location
        self._merge_key = merge_key
        self._destination = _real(location)
        self._owned = owned
        self.directory = owned.path
        self._put: dict[str, Artifact] = {}
        self._states: dict[str, FileState] = {}
        self.records = LocalRecords(self.directory, merge_key, take=self._claim, drop=self._drop)

    @property
    def ticket(self) -> Ticket:
        """What another process needs to write into the same directory."""
        return Ticket(directory=self.directory, attempt=self.directory.name, merge_key=self._merge_key)

    def put(self, artifact: Artifact, hashed_as: FileState | None = None) -> Receipt:
        """Check a finished file against its digest and make it durable; it is in its place already."""
        path = self.directory / artifact.path
        with file_errors(f"checking {path}", path):
            state = FileState.of(path.stat())
            if state != hashed_as:
                check_artifact(path, artifact)
            sync(path)
        receipt = Receipt(artifact=artifact, stored=state)
        self.take(receipt)
        return receipt

    def take(self, receipt: Receipt) -> None:
        """Remember a file and the state it was put in."""
        assert isinstance(receipt.stored, FileState)
        self._states[receipt.artifact.path] = receipt.stored
        self._put[receipt.artifact.path] = receipt.artifact

    def publish(self, manifest: Manifest) -> Release:
        """Write `manifest.json`, make everything durable, and rename the directory to its destination."""
        return self.reveal(encode_manifest(manifest))

    def reveal(self, manifest: ManifestFile) -> Release:
        """Publish with a manifest that is in bytes already."""
        check_all_put(manifest.manifest, self._put)
        with file_errors(f"publishing {self._location}", self._location.path):
            shutil.rmtree(self.directory / RECORDS_DIRECTORY, ignore_errors=True)
            self._check_untouched()
            (self.directory / MANIFEST_NAME).write_bytes(manifest.data)
            sync_tree(self.directory)
            try:
                # rename(2) puts a directory in the place of nothing or of an empty one, and refuses everything else.
                self.directory.rename(self._destination)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                return self._settle()
            sync(self._destination.parent)
        return manifest.release(self._location, created=True)

    def discard(self, *, keep: bool = False) -> bool:
        """Leave the hidden directory, which goes with the last that leaves; after `publish` only its lock is left."""
        return self.records.let_go(self._owned, keep=keep)

    def _claim(self, artifact: Artifact) -> Receipt | None:
        path = self.directory / artifact.path
        state = verified_state(path, artifact)
        if state is None:
            return None
        with file_errors(f"syncing {path}", path):
            sync(path)
        receipt = Receipt(artifact=artifact, stored=state)
        self.take(receipt)
        return receipt

    def _drop(self, name: str) -> None:
        self._states.pop(name, None)
        self._put.pop(name, None)

    def _settle(self) -> Release:
        found = _find(self._location)
        if found is None:
            raise TransientIOError(f"{self._location} was occupied for a moment, and is free again; try again")
        return found.settle(self._location, self._merge_key)

    def _check_untouched(self) -> None:
        """Refuse to ship what was written after it was checked, or was never announced."""
        for parent, _, names in os.walk(self.directory):
            for name in names:
                path = Path(parent, name)
                relative = path.relative_to(self.directory).as_posix()
                # A manifest may be there from an attempt to publish that failed halfway; it is written again.
                if relative != MANIFEST_NAME and self._states.get(relative) != FileState.of(path.stat()):
                    raise InternalError(f"{path} was written without put, or after it; merge again")


def _real(location: LocalPath) -> Path:
    return Path(os.path.realpath(location.path))


def _find(location: LocalPath) -> ManifestFile | None:
    with file_errors(f"reading {location}", location.path):
        if not location.path.exists():
            if _real(location).is_symlink():
                raise DestinationOccupiedError(
                    f"{location} is a link that leads back to itself, in whose place no directory can be renamed; "
                    "choose another destination"
                )
            return None
        if not location.path.is_dir():
            raise DestinationOccupiedError(f"{location} is a file, expected a directory or nothing")
        names = [entry.name for entry in location.path.iterdir()]
        if MANIFEST_NAME in names:
            data = read_manifest(location.path / MANIFEST_NAME)
            if data is None:
                raise occupied(location, names, f"a {MANIFEST_NAME} that is no regular file")
            return decode_existing(data, location)
        if names:
            if inner := _release_below(location.path):
                raise holds_below(location, LocalPath(inner))
            raise occupied(location, names, f"files, but no {MANIFEST_NAME}")
    return None


def _refuse_above(location: LocalPath, destination: Path) -> None:
    """Refuse a directory inside of a release, wherever links lead to, as far as this process may look.

    Raises:
        DestinationOccupiedError: names the release.
    """
    for parent in destination.parents:
        try:
            data = read_manifest(parent / MANIFEST_NAME)
        except PermissionError:
            _log.info("whether there is a release cannot be told", extra={"place": str(parent)})
            continue
        if data is not None and is_release(data):
            raise lies_inside(location, LocalPath(parent))


def _release_below(directory: Path) -> Path | None:
    for parent, _, names in itertools.islice(os.walk(directory), _MAX_DIRECTORIES):
        if MANIFEST_NAME in names:
            data = read_manifest(Path(parent, MANIFEST_NAME))
            if data is not None and is_release(data):
                return Path(parent)
    return None
