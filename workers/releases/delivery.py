"""Releases on their way to deployment: checked where they are, or brought here and checked on the way."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.errors import BadInputError, NotFoundError
from jobs.locations import LocalPath, Location, normal_path
from jobs.release import MANIFEST_NAME, REPORT_NAME, Artifact, Manifest
from workers.files.layout import INDEX_FILE
from workers.files.local import FileState, file_errors
from workers.files.scratch import OwnedDirectory, sweep
from workers.releases.agreement import disagreements, missing_parts, missing_shards
from workers.releases.occupied import occupied
from workers.releases.released import MAX_MANIFEST_BYTES, MAX_REPORT_BYTES, ManifestFile, decode_manifest
from workers.releases.sinks.directory import DirectorySink, DirectoryStaging
from workers.sources.contents import Contents, LocalContents, open_contents

_NUM_STREAMS = 4
_READ = {REPORT_NAME: disagreements, INDEX_FILE: missing_shards}
"""Files that are compared with the manifest."""


def verify_release(location: Location, scratch: Path) -> Manifest:
    """Check a release where it is: every file of its manifest, by size and SHA-256, and that there is nothing else.

    What its manifest says of its parity is compared with its parity report. Report, configuration, weights and every
    shard of the index have to be there.

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
        _check(contents, found.manifest, location)
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
        DestinationOccupiedError: the directory holds something else, or lies inside another release.
        BadInputError: the release, or the copy that is there, is not what its manifest says; lists every difference.
            Or the directory is the one this process is in, or a mount point: neither can be replaced by a rename.
        NotFoundError: there is no release.
        AuthError, TransientIOError, NoCapacityError: by kind of fault.
    """
    destination = LocalPath(normal_path(directory))
    owned = _owned(destination.path.parent, f".{destination.name}.fetch-")
    try:
        contents = open_contents(location, owned.path)
        found = _read_manifest(contents, location)
        if _is_there(destination, found):
            return found.manifest
        _refuse_working_directory(destination)
        staging = DirectorySink(destination).open(found.manifest.merge_key)
        try:
            _check(contents, found.manifest, location, staging)
            staging.reveal(found)
        finally:
            staging.discard()
    finally:
        owned.leave()
    return found.manifest


def _refuse_working_directory(destination: LocalPath) -> None:
    """Refuse the directory this process is in: a shell that is there would be left in one that is gone."""
    if destination.path.exists() and destination.path.samefile("."):
        raise BadInputError(
            f"{destination} is the working directory, and a release appears by a rename, which would leave you in a "
            "directory that is gone; name one that does not exist yet, such as ./release"
        )


def _owned(parent: Path, prefix: str) -> OwnedDirectory:
    with file_errors(f"making a directory in {parent}", parent):
        sweep(parent, prefix)
        return OwnedDirectory.make(parent, prefix)


def _read_manifest(contents: Contents, location: Location) -> ManifestFile:
    if odd := contents.oddities.get(MANIFEST_NAME):
        raise BadInputError(f"{location}: {MANIFEST_NAME} {odd}; do not deploy it")
    if MANIFEST_NAME not in contents.sizes:
        raise NotFoundError(f"{location} holds no release: expected {MANIFEST_NAME}, found {_some(contents.sizes)}")
    if contents.sizes[MANIFEST_NAME] > MAX_MANIFEST_BYTES:
        raise BadInputError(
            f"{location}: {MANIFEST_NAME} has {contents.sizes[MANIFEST_NAME]} bytes and is none of ours"
        )
    return decode_manifest(b"".join(contents.read(MANIFEST_NAME)), location)


def _check(contents: Contents, manifest: Manifest, location: Location, staging: DirectoryStaging | None = None) -> None:
    """Read every file that is there with its size, and compare it; raise one error that lists everything wrong.

    Args:
        contents: at the location.
        manifest: that was found there.
        location: for the message.
        staging: gets the files, where they are to be brought somewhere.
    """
    named = {artifact.path: artifact for artifact in manifest.files}
    unnamed = {MANIFEST_NAME, *contents.beside}
    odd = {name for name in contents.oddities if name in named}
    wrong = [f"{name}: not in the manifest" for name in contents.sizes.keys() - named.keys() - unnamed]
    wrong += missing_parts(manifest)
    wrong += [f"{name}: {what}" for name, what in contents.oddities.items()]
    whole = []
    for name, artifact in named.items():
        if name in odd:
            continue
        if name not in contents.sizes:
            wrong.append(f"{name}: missing")
        elif contents.sizes[name] != artifact.num_bytes:
            wrong.append(f"{name}: {contents.sizes[name]} bytes, expected {artifact.num_bytes}")
        elif name in _READ and artifact.num_bytes > MAX_REPORT_BYTES:
            wrong.append(f"{name}: {artifact.num_bytes} bytes, more than any of this name has")
        else:
            whole.append(artifact)

    def difference(artifact: Artifact) -> list[str]:
        kept: list[bytes] | None = [] if artifact.path in _READ else None
        chunks = _keeping(contents.read(artifact.path), kept)
        differs = _difference(artifact, chunks) if staging is None else _bring(artifact, chunks, staging)
        if differs is not None:
            return [differs]
        return [] if kept is None else _READ[artifact.path](manifest, b"".join(kept))

    with ThreadPoolExecutor(_NUM_STREAMS, thread_name_prefix="verify") as pool:
        wrong.extend(text for texts in pool.map(difference, whole) for text in texts)
    if wrong:
        listed = "\n  ".join(sorted(wrong))
        raise BadInputError(f"{location} is not what its manifest says, do not deploy it:\n  {listed}")


def _keeping(chunks: Iterator[bytes], kept: list[bytes] | None) -> Iterator[bytes]:
    """Yield what is yielded, and keep it where that is asked for."""
    for chunk in chunks:
        if kept is not None:
            kept.append(chunk)
        yield chunk


def _difference(artifact: Artifact, chunks: Iterator[bytes]) -> str | None:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return _compare(artifact, digest.hexdigest())


def _bring(artifact: Artifact, chunks: Iterator[bytes], staging: DirectoryStaging) -> str | None:
    path = staging.directory / artifact.path
    digest = hashlib.sha256()
    with file_errors(f"writing {path}", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        state = FileState.of(path.stat())
    if difference := _compare(artifact, digest.hexdigest()):
        return difference
    staging.put(artifact, state)
    return None


def _compare(artifact: Artifact, sha256: str) -> str | None:
    return None if sha256 == artifact.sha256 else f"{artifact.path}: SHA-256 {sha256}, expected {artifact.sha256}"


def _is_there(destination: LocalPath, found: ManifestFile) -> bool:
    """Whether a directory holds this release already; if so, it is checked."""
    if not destination.path.exists():
        return False
    contents = LocalContents(destination)
    if contents.oddities and not contents.sizes:
        raise occupied(destination, list(contents.oddities), "something other than this release")
    if not contents.sizes:
        return False
    if MANIFEST_NAME not in contents.sizes or b"".join(contents.read(MANIFEST_NAME)) != found.data:
        raise occupied(destination, list(contents.sizes), "something other than this release")
    _check(contents, found.manifest, destination)
    return True


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3]) or "nothing"
