"""The manifest of a release: written in one form only, read with suspicion, and compared with the files it names."""

import errno
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import from_json

from jobs.errors import BadInputError, DestinationOccupiedError, InternalError
from jobs.locations import Location
from jobs.parity_report import ParityReport
from jobs.release import MANIFEST_NAME, Artifact, Manifest, Release, one_name
from jobs.request_files.problems import show
from workers.files.local import sha256_of

MAX_MANIFEST_BYTES = 16 << 20
"""A larger `manifest.json` is not ours."""
MAX_REPORT_BYTES = 64 << 20
"""A larger `parity.json` is not ours."""
_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
"""Nothing of this name, a link, or a socket."""


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
    if len(data) > MAX_MANIFEST_BYTES:
        raise BadInputError(f"{location}: {MANIFEST_NAME} has more than {MAX_MANIFEST_BYTES} bytes and is none of ours")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        wrong = what_is_wrong(error, Manifest, f"{location}: {MANIFEST_NAME}", "no manifest of mergefleet")
        raise BadInputError(wrong) from error
    if field := repeated_field(data):
        raise BadInputError(f"{location}: {MANIFEST_NAME} names the field {show(field)} twice; do not deploy it")
    times = Counter(one_name(artifact.path) for artifact in manifest.files)
    if twice := sorted(artifact.path for artifact in manifest.files if times[one_name(artifact.path)] > 1):
        raise BadInputError(
            f"{location}: {MANIFEST_NAME} names {', '.join(dict.fromkeys(twice[:3]))} more than once, expected each "
            "file once, upper and lower case and forms of one letter taken as one; do not deploy it"
        )
    if MANIFEST_NAME in times:
        raise BadInputError(f"{location}: {MANIFEST_NAME} names itself, which no manifest of mergefleet does")
    return ManifestFile(manifest=manifest, data=data)


def repeated_field(data: bytes) -> str | None:
    """Return a field that stands twice in one object of a JSON text: readers differ in which of the two they take."""
    repeated = list[str]()

    def see(pairs: list[tuple[str, object]]) -> None:
        times = Counter(name for name, _ in pairs)
        repeated.extend(name for name, number in times.items() if number > 1)

    json.loads(data, object_pairs_hook=see)
    return repeated[0] if repeated else None


def what_is_wrong(error: ValidationError, model: type[Manifest | ParityReport], what: str, kind: str) -> str:
    """Say what is wrong about a file; that it is of a newer mergefleet, before the fields that this one brings."""
    found = {detail["loc"]: detail for detail in error.errors(include_url=False)}
    known = model.model_fields["schema_version"].default
    schema = found[("schema",)]["input"] if ("schema",) in found else None
    if isinstance(schema, int) and schema > known and ("merge_key",) not in found:
        return (
            f"{what} has schema {schema}, and this mergefleet reads up to {known}; "
            "use the version that wrote it, or a newer one"
        )
    loc, first = next(iter(found.items()))
    return f"{what} is {kind}: {'.'.join(str(part) for part in loc) or 'the whole file'}: {first['msg']}"


def read_manifest(path: Path) -> bytes | None:
    """Return the bytes of a manifest in a directory, at most one more than a manifest has.

    Returns:
        None when there is no regular file of this name: links are not followed, and a FIFO is not waited for.

    Raises:
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    finally:
        os.close(descriptor)


def decode_existing(data: bytes, location: Location) -> ManifestFile:
    """Read the manifest found at a destination.

    Raises:
        DestinationOccupiedError: it is something else that has the same name.
    """
    try:
        return decode_manifest(data, location)
    except BadInputError as error:
        raise DestinationOccupiedError(f"{error}; choose another destination") from error


def is_release(data: bytes) -> bool:
    """Whether a `manifest.json` is that of a release, of any version: other programs use the name, too."""
    try:
        found = from_json(data) if len(data) <= MAX_MANIFEST_BYTES else None
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() >= {"merge_key", "files"}


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
