"""Releases on their way to deployment: checked where they are, or brought here and checked on the way."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.errors import BadInputError, NotFoundError
from jobs.locations import LocalPath, Location
from jobs.release import MANIFEST_NAME, Artifact, Manifest
from workers.contents import Contents, LocalContents, open_contents
from workers.files import file_errors
from workers.released import MAX_MANIFEST_BYTES, ManifestFile, decode_manifest, occupied
from workers.scratch import OwnedDirectory, sweep
from workers.sinks.directory import DirectorySink, DirectoryStaging

_NUM_STREAMS = 4


def verify_release(location: Location, scratch: Path) -> Manifest:
    """Check a release where it is: every file of its manifest, by size and SHA-256, and that there is nothing else.

    Args:
        location: of the release.
        scratch: directory for files on their way from a Hub; made when missing.

    Returns:
        Its manifest.

    Raises:
        BadInputError: the release is not what its manifest says; the message lists every difference.
        NotFoundError: there is no release.
        AuthError, TransientIOError, NoCapacityError: by kind of fault.
    """
    owned = _owned(scratch, "verify-")
    try:
        contents = open_contents(location, owned.path)
        found = _read_manifest(contents, location)
        _check(contents, found.manifest, location, functools.partial(_difference, contents))
    finally:
        owned.leave()
    return found.manifest


def pull_release(location: Location, directory: Path) -> Manifest:
    """Bring a release to a directory, checking every byte on the way. The directory appears whole, or not at all.

    Args:
        location: of the release.
        directory: missing, empty, or holding this very release already, which is checked instead.

    Returns:
        Its manifest.

    Raises:
        DestinationOccupiedError: the directory holds something else.
        BadInputError: the release, or the copy that is there, is not what its manifest says; lists every difference.
        NotFoundError: there is no release.
        AuthError, TransientIOError, NoCapacityError: by kind of fault.
    """
    destination = LocalPath(directory.absolute())
    owned = _owned(destination.path.parent, f".{destination.name}.fetch-")
    try:
        contents = open_contents(location, owned.path)
        found = _read_manifest(contents, location)
        if _is_there(destination, found):
            return found.manifest
        staging = DirectorySink(destination).open(found.manifest.merge_key)
        try:
            _check(contents, found.manifest, location, functools.partial(_bring, contents, staging))
            staging.reveal(found)
        finally:
            staging.discard()
    finally:
        owned.leave()
    return found.manifest


def _owned(parent: Path, prefix: str) -> OwnedDirectory:
    with file_errors(f"making a directory in {parent}"):
        sweep(parent, prefix)
        return OwnedDirectory.make(parent, prefix)


def _read_manifest(contents: Contents, location: Location) -> ManifestFile:
    if MANIFEST_NAME not in contents.sizes:
        raise NotFoundError(f"{location} holds no release: expected {MANIFEST_NAME}, found {_some(contents.sizes)}")
    if contents.sizes[MANIFEST_NAME] > MAX_MANIFEST_BYTES:
        raise BadInputError(
            f"{location}: {MANIFEST_NAME} has {contents.sizes[MANIFEST_NAME]} bytes and is none of ours"
        )
    return decode_manifest(b"".join(contents.read(MANIFEST_NAME)), location)


def _check(
    contents: Contents, manifest: Manifest, location: Location, difference: Callable[[Artifact], str | None]
) -> None:
    """Apply `difference` to every file that is there with its size; raise one error that lists everything wrong."""
    named = {artifact.path: artifact for artifact in manifest.files}
    wrong = [f"{name}: not in the manifest" for name in contents.sizes.keys() - named.keys() - {MANIFEST_NAME}]
    whole = []
    for name, artifact in named.items():
        if name not in contents.sizes:
            wrong.append(f"{name}: missing")
        elif contents.sizes[name] != artifact.num_bytes:
            wrong.append(f"{name}: {contents.sizes[name]} bytes, expected {artifact.num_bytes}")
        else:
            whole.append(artifact)
    with ThreadPoolExecutor(_NUM_STREAMS, thread_name_prefix="verify") as pool:
        wrong.extend(text for text in pool.map(difference, whole) if text)
    if wrong:
        listed = "\n  ".join(sorted(wrong))
        raise BadInputError(f"{location} is not what its manifest says, do not deploy it:\n  {listed}")


def _difference(contents: Contents, artifact: Artifact) -> str | None:
    digest = hashlib.sha256()
    for chunk in contents.read(artifact.path):
        digest.update(chunk)
    return _compare(artifact, digest.hexdigest())


def _bring(contents: Contents, staging: DirectoryStaging, artifact: Artifact) -> str | None:
    path = staging.directory / artifact.path
    digest = hashlib.sha256()
    with file_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for chunk in contents.read(artifact.path):
                digest.update(chunk)
                file.write(chunk)
    if difference := _compare(artifact, digest.hexdigest()):
        return difference
    staging.put(artifact)
    return None


def _compare(artifact: Artifact, sha256: str) -> str | None:
    return None if sha256 == artifact.sha256 else f"{artifact.path}: SHA-256 {sha256}, expected {artifact.sha256}"


def _is_there(destination: LocalPath, found: ManifestFile) -> bool:
    """Whether a directory holds this release already; if so, it is checked."""
    if not destination.path.exists():
        return False
    contents = LocalContents(destination)
    if not contents.sizes:
        return False
    if MANIFEST_NAME not in contents.sizes or b"".join(contents.read(MANIFEST_NAME)) != found.data:
        raise occupied(destination, list(contents.sizes), "something other than this release")
    _check(contents, found.manifest, destination, functools.partial(_difference, contents))
    return True


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3]) or "nothing"
