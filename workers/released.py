"""The manifest of a release: written in one form only, read with suspicion, and compared with the files it names."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from jobs.errors import BadInputError, DestinationOccupiedError, InternalError
from jobs.locations import Location
from jobs.release import MANIFEST_NAME, Artifact, Manifest, Release
from workers.files import sha256_of

MAX_MANIFEST_BYTES = 64 << 20
"""A larger `manifest.json` is not ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """A manifest and its bytes as they are in the file."""

    manifest: Manifest
    data: bytes

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(self.data).hexdigest()

    def release(self, location: Location, *, created: bool) -> Release:
        """Return the release this manifest stands for."""
        return Release(location=location, manifest=self.manifest, manifest_sha256=self.sha256, created=created)

    def settle(self, location: Location, merge_key: str) -> Release:
        """Return the release that is already at a location, when it is the one wanted there.

        Raises:
            DestinationOccupiedError: it has another merge key.
        """
        if self.manifest.merge_key != merge_key:
            raise DestinationOccupiedError(
                f"{location} holds the release of request {self.manifest.request_id!r} with merge key "
                f"{self.manifest.merge_key[:16]}…, expected {merge_key[:16]}…; choose another destination"
            )
        return self.release(location, created=False)


def encode_manifest(manifest: Manifest) -> ManifestFile:
    """Return the one form in which a manifest is written."""
    text = manifest.model_dump_json(by_alias=True, indent=2)
    return ManifestFile(manifest=manifest, data=f"{text}\n".encode())


def decode_manifest(data: bytes, location: Location) -> ManifestFile:
    """Read a manifest.

    Args:
        data: the bytes of `manifest.json`.
        location: where they are from, for the message.

    Raises:
        BadInputError: they are no manifest of mergefleet.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise BadInputError(
            f"{location}: {MANIFEST_NAME} is no manifest of mergefleet: {field}: {first['msg']}"
        ) from error
    return ManifestFile(manifest=manifest, data=data)


def decode_existing(data: bytes, location: Location) -> ManifestFile:
    """Read the manifest found at a destination.

    Raises:
        DestinationOccupiedError: it is something else that has the same name.
    """
    try:
        return decode_manifest(data, location)
    except BadInputError as error:
        raise DestinationOccupiedError(f"{error}; choose another destination") from error


def occupied(location: Location, names: Sequence[str], what: str) -> DestinationOccupiedError:
    """Return the error for a destination that holds something else.

    Args:
        location: the destination.
        names: what is there; the first three are named in the message.
        what: what these are, in a few words.
    """
    shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return DestinationOccupiedError(f"{location} holds {what}: {shown}; choose another destination or empty it first")


def is_release(data: bytes) -> bool:
    """Whether a `manifest.json` is that of a release, of whatever version: other programs use the name, too."""
    try:
        found = json.loads(data) if len(data) <= MAX_MANIFEST_BYTES else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= {"merge_key", "files"}


def lies_inside(location: Location, outer: Location) -> DestinationOccupiedError:
    """Return the error for a destination inside of a release."""
    return DestinationOccupiedError(
        f"{location} lies inside the release at {outer}, which would hold more than its manifest says; "
        "choose a destination beside it"
    )


def holds_below(location: Location, inner: Location) -> DestinationOccupiedError:
    """Return the error for a destination that another release lies below."""
    return DestinationOccupiedError(
        f"{location} has the release at {inner} below it, which is no part of this one; choose a destination beside it"
    )


def check_artifact(path: Path, artifact: Artifact) -> None:
    """Compare a finished file with what was computed while it was written.

    Raises:
        InternalError: size or SHA-256 differ.
    """
    num_bytes = path.stat().st_size
    if num_bytes != artifact.num_bytes:
        raise InternalError(f"{path} has {num_bytes} bytes, expected {artifact.num_bytes}: it changed after its digest")
    if (sha256 := sha256_of(path)) != artifact.sha256:
        raise changed(path, sha256, artifact)


def changed(path: Path, sha256: str, artifact: Artifact) -> InternalError:
    """Return the error for a file whose bytes are not those of its artifact."""
    return InternalError(
        f"{path} has SHA-256 {sha256}, expected {artifact.sha256}: it changed after its digest; merge again"
    )


def check_all_put(manifest: Manifest, put: Mapping[str, Artifact]) -> None:
    """Check that what has been shipped is what the manifest names.

    Args:
        manifest: of the release about to be published.
        put: what has been shipped, by path.

    Raises:
        InternalError: they differ; the message names the files.
    """
    named = {artifact.path: artifact for artifact in manifest.files}
    if different := sorted(path for path in named.keys() | put.keys() if named.get(path) != put.get(path)):
        raise InternalError(f"the manifest and the files that were put differ in {', '.join(different)}")
