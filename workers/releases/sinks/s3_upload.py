"""One file on its way to an S3 store: its parts are stored as they are read, the object appears when it is told to.

Every byte is covered twice: the store compares the CRC-64/NVME of each part and of the whole object with ours, and the
SHA-256 of what was read is compared with what was computed when the file was written.
"""

import base64
import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from awscrt.checksums import crc64nvme

from jobs.errors import NotFoundError, TransientIOError, UnsupportedError
from jobs.release import Artifact
from workers.files.local import file_errors
from workers.releases.released import changed
from workers.releases.sinks.s3_records import abort_upload, begin_record, end_record
from workers.sources.s3_client import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

MIN_PART_BYTES = 16 << 20
"""S3 allows parts of 5 MiB to 5 GiB. A file no larger than one part goes up in one request, when it is published."""

_MAX_PARTS = 10_000
_NUM_STREAMS = 4
_MERGE_KEY = "mergefleet-merge-key"
_SHA256 = "mergefleet-sha256"
_ATTEMPT = "mergefleet-attempt"
_DESTINATION = "mergefleet-destination"


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
    crc = _text(crc64nvme(data))
    answer = store.client.put_object(
        Bucket=store.place.bucket,
        Key=store.key(name),
        Body=data,
        ChecksumCRC64NVME=crc,
        Metadata=mark.metadata(),
        IfNoneMatch="*",
    )
    _compare(f"{store.place}/{name}", answer.get("ChecksumCRC64NVME"), crc)
    return answer["ETag"]


class Upload:
    """One file, in one request or in many parts. Nothing of it is visible before `complete`."""

    def __init__(
        self,
        store: S3Store,
        path: Path,
        artifact: Artifact,
        mark: Mark,
        *,
        parts: StoredParts | None = None,
        always_in_parts: bool = False,
    ) -> None:
        """Name a file; nothing is sent yet.

        Args:
            store: where it goes.
            path: of the file.
            artifact: its name, size and SHA-256.
            mark: for the object.
            parts: what another process has stored of it already.
            always_in_parts: whether a small file has to be at the store before it is completed, too.
        """
        self.artifact = artifact
        self._store = store
        self._key = store.key(artifact.path)
        self._path = path
        self._mark = mark
        self._upload_id = parts.upload_id if parts else ""
        self._record_id = parts.record_id if parts else ""
        self._is_complete = False
        self.in_parts = bool(self._upload_id) or always_in_parts or artifact.num_bytes > MIN_PART_BYTES
        self._parts: list[CompletedPartTypeDef] = list(parts.parts) if parts else []
        self._crc = parts.crc if parts else ""

    @property
    def parts(self) -> StoredParts:
        """What another process needs to complete it."""
        return StoredParts(
            upload_id=self._upload_id, record_id=self._record_id, parts=tuple(self._parts), crc=self._crc
        )

    def send(self) -> None:
        """Check the file and store its parts. May be called again after an error or an abort: it starts over.

        Raises:
            InternalError: the file is not what its artifact says.
            TransientIOError, AuthError, NotFoundError, NoCapacityError: by kind of fault.
            UnsupportedError: the store computes no checksums to compare with.
        """
        self.abort()
        if not self._path.exists():
            raise TransientIOError(
                f"{self._store.place}/{self.artifact.path}: its parts are gone from the store, and the process that "
                "has the file is another one; merge again"
            )
        if not self.in_parts:
            self.check()
            return
        bucket = self._store.place.bucket
        with self._store.errors(), ThreadPoolExecutor(_NUM_STREAMS, thread_name_prefix="s3-upload") as pool:
            self._upload_id = self._store.client.create_multipart_upload(
                Bucket=bucket,
                Key=self._key,
                ChecksumAlgorithm="CRC64NVME",
                ChecksumType="FULL_OBJECT",
                Metadata=self._mark.metadata(),
            )["UploadId"]
            # Before any byte is sent: whatever ends this process, the bytes can be found again.
            self._record_id = begin_record(self._store, self._mark.attempt, self.artifact.path, self._upload_id)
            waiting: deque[Future[CompletedPartTypeDef]] = deque()
            self._parts = []
            for number, data in enumerate(self._checked(), start=1):
                if len(waiting) == _NUM_STREAMS:
                    self._parts.append(waiting.popleft().result())
                waiting.append(pool.submit(self._send_part, number, data))
            self._parts.extend(future.result() for future in waiting)

    def check(self) -> None:
        """Read the file without sending it.

        Raises:
            InternalError: the file is not what its artifact says.
        """
        for _ in self._checked():
            pass

    def is_copy(self, found: StoredObject) -> bool:
        """Whether an object holds this file's bytes, as far as its checksum and marks say. After `send` or `check`."""
        return (
            found.mark is not None
            and self._mark.is_same_release(found.mark)
            and found.mark.sha256 == self.artifact.sha256
            and found.num_bytes == self.artifact.num_bytes
            and found.crc == self._crc
        )

    def complete(self) -> str:
        """Make the object visible, where none is. Sends it first, if need be.

        Returns:
            The object's ETag.

        Raises:
            ClientError: as botocore raises it; 412 when an object is there, 404 when the parts are gone.
            TransientIOError: the store has other bytes than were sent.
            UnsupportedError: the store computes no checksums to compare with.
        """
        if not self.in_parts:
            data = b"".join(self._checked())
            return create_whole(self._store, self.artifact.path, data, self._mark)
        if self._is_complete or not self._upload_id:
            self.send()
        answer = self._store.client.complete_multipart_upload(
            Bucket=self._store.place.bucket,
            Key=self._key,
            UploadId=self._upload_id,
            MultipartUpload={"Parts": self._parts},
            ChecksumCRC64NVME=self._crc,
            ChecksumType="FULL_OBJECT",
            MpuObjectSize=self.artifact.num_bytes,
            IfNoneMatch="*",
        )
        self._is_complete = True
        _compare(f"{self._store.place}/{self.artifact.path}", answer.get("ChecksumCRC64NVME"), self._crc)
        return answer["ETag"]

    def abort(self) -> None:
        """Drop the parts, unless they have become the object, and the record of them. Idempotent."""
        name, attempt = self.artifact.path, self._mark.attempt
        with self._store.errors():
            if self._upload_id and not self._is_complete:
                abort_upload(self._store, name, self._upload_id)
            if self._record_id:
                end_record(self._store, attempt, name, self._upload_id, self._record_id)
        self._upload_id = self._record_id = ""
        self._is_complete = False

    def _checked(self) -> Iterator[bytes]:
        """Yield the file in parts; at its end, refuse it if it is not what its artifact says."""
        sha256, crc = hashlib.sha256(), 0
        size = part_bytes(self.artifact.num_bytes)
        with file_errors(f"reading {self._path}"), self._path.open("rb") as file:
            data = file.read(size)
            while True:  # an empty file has one part, an empty one
                sha256.update(data)
                crc = crc64nvme(data, crc)
                yield data
                if not (data := file.read(size)):
                    break
        if sha256.hexdigest() != self.artifact.sha256:
            raise changed(self._path, sha256.hexdigest(), self.artifact)
        self._crc = _text(crc)

    def _send_part(self, number: int, data: bytes) -> "CompletedPartTypeDef":
        crc = _text(crc64nvme(data))
        answer = self._store.client.upload_part(
            Bucket=self._store.place.bucket,
            Key=self._key,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=data,
            ChecksumCRC64NVME=crc,
        )
        _compare(f"part {number} of {self._store.place}/{self.artifact.path}", answer.get("ChecksumCRC64NVME"), crc)
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC64NVME": crc}


def _text(crc: int) -> str:
    """Return a checksum as S3 writes it: base64 of its bytes, highest first."""
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


def _compare(what: str, answered: str | None, computed: str) -> None:
    if answered is None:
        raise UnsupportedError(
            f"{what}: the store returned no CRC-64/NVME to compare with; use one that checks uploads"
        )
    if answered != computed:
        raise TransientIOError(f"{what}: the store has CRC-64/NVME {answered}, {computed} was sent")
