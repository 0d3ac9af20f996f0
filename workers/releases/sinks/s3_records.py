"""Which unfinished uploads below a prefix are this destination's own, and what is recorded of them.

A store lists unfinished uploads by key and id, and says of none who began it. What it does tell is a key, so a record
is an upload whose key names the other:

    <prefix>/.mergefleet-uploads/<attempt>/<upload id>/<name>

It is begun before the first part is sent, is as invisible as what it names, and ends after it. A process that finds
one, on any machine, knows the upload for an attempt at this destination; uploads without one are strangers'. See
decision 17. Once the file is put and checked, its first part is what a later attempt has to know to use the upload
again: such a record is completed to be read, and deleted at once. See decision 24.
"""

import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

from awscrt.checksums import crc64nvme
from botocore.exceptions import ClientError

from workers.releases.sinks.s3_objects import Mark, checksum_text
from workers.sources.s3_client import S3Store, error_code, error_status

logger = logging.getLogger(__name__)

RECORDS = ".mergefleet-uploads"
"""No file of a release has such a name: those begin with a letter or a digit."""
_KEY_CHARACTERS = 16
"""Of a merge key, in the name of an attempt: records of other releases are not opened."""
_DENIED = 403
_GONE = frozenset({404, 409, 412})


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRecord:
    """An unfinished upload that an attempt at this destination has recorded."""

    attempt: str
    upload_id: str
    name: str
    """Of the file."""
    record_id: str

    @property
    def record_name(self) -> str:
        """Name, below the prefix, of the record."""
        return record_name(self.attempt, self.name, self.upload_id)


def new_attempt(merge_key: str) -> str:
    """Return a name for an attempt at a release, unlike any other."""
    return f"{merge_key[:_KEY_CHARACTERS]}-{secrets.token_hex(8)}"


def is_of_release(attempt: str, merge_key: str) -> bool:
    """Whether an attempt is at a release, as far as its name tells."""
    return attempt.startswith(f"{merge_key[:_KEY_CHARACTERS]}-")


def record_name(attempt: str, name: str, upload_id: str) -> str:
    """Return the name, below the prefix, of the record of an upload."""
    return f"{RECORDS}/{attempt}/{quote(upload_id, safe='')}/{name}"


def begin_record(store: S3Store, mark: Mark, name: str, upload_id: str) -> str:
    """Record an unfinished upload, so that any later attempt may abort it.

    Returns:
        The id of the record itself.
    """
    key = store.key(record_name(mark.attempt, name, upload_id))
    return store.client.create_multipart_upload(Bucket=store.place.bucket, Key=key, Metadata=mark.metadata())[
        "UploadId"
    ]


def fill_record(store: S3Store, record: UploadRecord, data: bytes) -> None:
    """Put into a record what a later attempt has to know."""
    store.client.upload_part(
        Bucket=store.place.bucket,
        Key=store.key(record.record_name),
        UploadId=record.record_id,
        PartNumber=1,
        Body=data,
        ChecksumCRC64NVME=checksum_text(crc64nvme(data)),
    )


def read_record(store: S3Store, record: UploadRecord, max_bytes: int) -> bytes | None:
    """Return what was put into a record, which ends with it; None where nothing was, or others have ended it.

    Atomicity: for a moment it is an object. A kill leaves it, with the mark that the record was begun with.
    """
    name = record.record_name
    parts = (parts_of(store, name, record.record_id) or {}).get(1, [])
    if len({part.etag for part in parts}) != 1:  # SeaweedFS lists all that were put, in no order
        return None
    try:
        answer = store.client.complete_multipart_upload(
            Bucket=store.place.bucket,
            Key=store.key(name),
            UploadId=record.record_id,
            MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": parts[0].etag}]},
            IfNoneMatch="*",
        )
    except ClientError as error:
        if error_status(error) in _GONE:
            return None
        raise
    data = store.content(name, max_bytes)
    store.delete(name, answer["ETag"])
    return data


def end_record(store: S3Store, record: UploadRecord) -> None:
    """End the record of an upload that is completed or aborted."""
    _abort(store, record.record_name, record.record_id)


def abort_upload(store: S3Store, name: str, upload_id: str) -> None:
    """Abort an unfinished upload; none is fine."""
    _abort(store, name, upload_id)


def abort_recorded(store: S3Store) -> int:
    """Abort the unfinished uploads that attempts at this destination have recorded, and end their records.

    Returns:
        How many uploads were recorded.
    """
    return abort_all(store, recorded(store))


def abort_all(store: S3Store, records: list[UploadRecord]) -> int:
    """Abort recorded uploads, and end their records.

    Returns:
        How many there were.
    """
    with store.errors():
        for record in records:
            abort_upload(store, record.name, record.upload_id)
            end_record(store, record)
    if records:
        logger.info("aborted unfinished uploads", extra={"place": str(store.place), "uploads": len(records)})
    return len(records)


def recorded(store: S3Store) -> list[UploadRecord]:
    """Return the uploads that attempts at this destination have recorded; what is no record is ended."""
    with store.errors():
        return list(_recorded(store))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """What a store says of one part."""

    num_bytes: int
    etag: str
    crc: str | None
    """CRC-64/NVME in base64, where the store tells it."""


def parts_of(store: S3Store, name: str, upload_id: str) -> Mapping[int, list[StoredPart]] | None:
    """Return the parts of an unfinished upload by their numbers, as listed.

    SeaweedFS lists a part that was sent twice two times.

    Returns:
        None where there is no such upload, or the credentials may not list its parts.
    """
    parts: dict[int, list[StoredPart]] = {}
    pages = store.client.get_paginator("list_parts").paginate(
        Bucket=store.place.bucket, Key=store.key(name), UploadId=upload_id
    )
    try:
        for page in pages:
            for part in page.get("Parts", []):
                stored = StoredPart(num_bytes=part["Size"], etag=part["ETag"], crc=part.get("ChecksumCRC64NVME"))
                parts.setdefault(part["PartNumber"], []).append(stored)
    except ClientError as error:
        if error_code(error) == "NoSuchUpload":
            return None
        if error_status(error) == _DENIED:
            logger.warning(
                "parts may not be listed, so finished shards are sent anew", extra={"place": str(store.place)}
            )
            return None
        raise
    return parts


def _recorded(store: S3Store) -> Iterator[UploadRecord]:
    start = store.key(f"{RECORDS}/")
    pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.place.bucket, Prefix=start)
    for key, record_id in [(entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", [])]:
        attempt, _, rest = key.removeprefix(start).partition("/")
        quoted, _, name = rest.partition("/")
        if name:
            yield UploadRecord(attempt=attempt, upload_id=unquote(quoted), name=name, record_id=record_id)
        else:
            _abort(store, key.removeprefix(store.key("")), record_id)


def _abort(store: S3Store, name: str, upload_id: str) -> None:
    try:
        store.client.abort_multipart_upload(Bucket=store.place.bucket, Key=store.key(name), UploadId=upload_id)
    except ClientError as error:
        if error_code(error) != "NoSuchUpload":
            raise
