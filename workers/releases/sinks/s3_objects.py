"""Objects of an S3 store: what lies under a name, whose mark it bears, and small ones made in one request."""

import base64
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from awscrt.checksums import crc64nvme

from jobs.errors import NotFoundError, TransientIOError, UnsupportedError
from workers.sources.s3_client import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

MIN_PART_BYTES = 16 << 20
"""S3 allows parts of 5 MiB to 5 GiB. A file no larger than one part goes up in one request, when it is published."""
_MAX_PARTS = 10_000
_MERGE_KEY = "mergefleet-merge-key"
_SHA256 = "mergefleet-sha256"
_ATTEMPT = "mergefleet-attempt"
_DESTINATION = "mergefleet-destination"


def wants_parts(num_bytes: int) -> bool:
    """Whether a file of so many bytes goes up in several requests."""
    return num_bytes > MIN_PART_BYTES


def part_bytes(num_bytes: int) -> int:
    """Return the size of the parts of a file: whole MiB, and few enough parts for S3."""
    fewest = -(-num_bytes // _MAX_PARTS)
    return max(MIN_PART_BYTES, -(-fewest // (1 << 20)) * (1 << 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What every object of ours carries as metadata, so that a later attempt knows its own."""

    destination: str
    """Digest of the place it was written for: an object copied elsewhere, or of a release below, is not its own."""
    merge_key: str
    sha256: str
    attempt: str
    """Random; tells two attempts at the same release apart."""

    def metadata(self) -> dict[str, str]:
        """Return it as S3 metadata."""
        return {
            _DESTINATION: self.destination,
            _MERGE_KEY: self.merge_key,
            _SHA256: self.sha256,
            _ATTEMPT: self.attempt,
        }

    def is_same_release(self, other: "Mark | None") -> bool:
        """Whether another mark is of the same release at the same destination."""
        return other is not None and (other.destination, other.merge_key) == (self.destination, self.merge_key)


def destination_digest(store: S3Store) -> str:
    """Return the name of a destination in marks: metadata is ASCII, and prefixes need not be."""
    return hashlib.sha256(str(store.place).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """What a store says of one object."""

    num_bytes: int
    etag: str
    crc: str | None
    """The store's own CRC-64/NVME of the whole object, in base64."""
    mark: Mark | None
    """None when the object is not ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredParts:
    """What is needed to complete an upload from elsewhere; empty for a file that goes up in one request."""

    upload_id: str
    record_id: str
    parts: "tuple[CompletedPartTypeDef, ...]"
    crc: str


def look_at(store: S3Store, name: str) -> StoredObject | None:
    """Return what the store says of an object, or None when there is none."""
    try:
        with store.errors():
            answer = store.client.head_object(Bucket=store.place.bucket, Key=store.key(name), ChecksumMode="ENABLED")
    except NotFoundError:
        return None
    found = answer["Metadata"]
    mark = None
    if found.keys() >= {_DESTINATION, _MERGE_KEY, _SHA256, _ATTEMPT}:
        mark = Mark(
            destination=found[_DESTINATION],
            merge_key=found[_MERGE_KEY],
            sha256=found[_SHA256],
            attempt=found[_ATTEMPT],
        )
    return StoredObject(
        num_bytes=answer["ContentLength"],
        etag=answer["ETag"],
        crc=answer.get("ChecksumCRC64NVME"),
        mark=mark,
    )


def create_whole(store: S3Store, name: str, data: bytes, mark: Mark) -> str:
    """Create an object in one request, where none is.

    Returns:
        The object's ETag.

    Raises:
        ClientError: as botocore raises it; 412 when an object is there.
        TransientIOError, UnsupportedError: as `Upload.complete`.
    """
    crc = checksum_text(crc64nvme(data))
    answer = store.client.put_object(
        Bucket=store.place.bucket,
        Key=store.key(name),
        Body=data,
        ChecksumCRC64NVME=crc,
        Metadata=mark.metadata(),
        IfNoneMatch="*",
    )
    compare_checksums(f"{store.place}/{name}", answer.get("ChecksumCRC64NVME"), crc)
    return answer["ETag"]


def checksum_text(crc: int) -> str:
    """Return a checksum as S3 writes it: base64 of its bytes, highest first."""
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


def compare_checksums(what: str, answered: str | None, computed: str) -> None:
    """Hold the checksum that a store answered against the one of what was sent.

    Raises:
        UnsupportedError: it answered none.
        TransientIOError: it has another.
    """
    if answered is None:
        raise UnsupportedError(
            f"{what}: the store returned no CRC-64/NVME to compare with; use one that checks uploads"
        )
    if answered != computed:
        raise TransientIOError(f"{what}: the store has CRC-64/NVME {answered}, {computed} was sent")
