"""One file on its way to an S3 store: its parts are stored as they are read, the object appears when it is told to.

Every byte is covered twice: the store compares the CRC-64/NVME of each part and of the whole object with ours, and the
SHA-256 of what was read is compared with what was computed when the file was written.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from awscrt.checksums import crc64nvme

from jobs.errors import TransientIOError
from jobs.release import Artifact
from workers.files.local import file_errors
from workers.releases.records import RecordedPart, RecordedUpload
from workers.releases.released import changed
from workers.releases.sinks.s3_records import UploadRecord, abort_upload, begin_record, end_record, fill_record
from workers.sources.s3_client import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef
from workers.releases.sinks.s3_objects import (
    Mark,
    StoredObject,
    StoredParts,
    checksum_text,
    compare_checksums,
    create_whole,
    part_bytes,
    wants_parts,
)

_NUM_STREAMS = 4


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
        self.in_parts = bool(self._upload_id) or always_in_parts or wants_parts(artifact.num_bytes)
        self._parts: list[CompletedPartTypeDef] = list(parts.parts) if parts else []
        self._crc = parts.crc if parts else ""
        self.is_recorded = False
        """Whether a later attempt can use its parts, as far as this process knows."""

    @property
    def parts(self) -> StoredParts:
        """What another process needs to complete it."""
        return StoredParts(
            upload_id=self._upload_id, record_id=self._record_id, parts=tuple(self._parts), crc=self._crc
        )

    @property
    def recorded(self) -> RecordedUpload | None:
        """What is recorded of its parts; None where it has none at the store."""
        if not self._upload_id:
            return None
        parts = (
            RecordedPart(number=part["PartNumber"], etag=part["ETag"], crc=part["ChecksumCRC64NVME"])
            for part in self._parts
        )
        return RecordedUpload(parts=tuple(parts), crc=self._crc)

    @property
    def is_here(self) -> bool:
        """Whether its bytes are here, to be sent again."""
        return self._path.exists()

    def record(self, data: bytes) -> None:
        """Put what a later attempt has to know beside its parts."""
        with self._store.errors():
            fill_record(self._store, self._record, data)
        self.is_recorded = True

    @property
    def _record(self) -> UploadRecord:
        return UploadRecord(
            attempt=self._mark.attempt,
            upload_id=self._upload_id,
            name=self.artifact.path,
            record_id=self._record_id,
        )

    def send(self) -> None:
        """Check the file and store its parts. May be called again after an error or an abort: it starts over.

        Raises:
            InternalError: the file is not what its artifact says.
            TransientIOError, AuthError, NotFoundError, NoCapacityError: by kind of fault.
            UnsupportedError: the store computes no checksums to compare with.
        """
        self.abort()
        if not self.is_here:
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
            # Before any byte is sent, so that the bytes can be found again after any end of this process.
            self._record_id = begin_record(self._store, self._mark, self.artifact.path, self._upload_id)
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
        compare_checksums(f"{self._store.place}/{self.artifact.path}", answer.get("ChecksumCRC64NVME"), self._crc)
        return answer["ETag"]

    def abort(self) -> None:
        """Drop the parts, unless they have become the object, and the record of them. Idempotent."""
        with self._store.errors():
            if self._upload_id and not self._is_complete:
                abort_upload(self._store, self.artifact.path, self._upload_id)
            if self._record_id:
                end_record(self._store, self._record)
        self._upload_id = self._record_id = ""
        self.is_recorded = False
        self._is_complete = False

    def _checked(self) -> Iterator[bytes]:
        """Yield the file in parts; at its end, refuse it if it is not what its artifact says."""
        sha256, crc = hashlib.sha256(), 0
        size = part_bytes(self.artifact.num_bytes)
        with file_errors(f"reading {self._path}", self._path), self._path.open("rb") as file:
            data = file.read(size)
            while True:  # an empty file has one part, an empty one
                sha256.update(data)
                crc = crc64nvme(data, crc)
                yield data
                if not (data := file.read(size)):
                    break
        if sha256.hexdigest() != self.artifact.sha256:
            raise changed(self._path, sha256.hexdigest(), self.artifact)
        self._crc = checksum_text(crc)

    def _send_part(self, number: int, data: bytes) -> "CompletedPartTypeDef":
        crc = checksum_text(crc64nvme(data))
        answer = self._store.client.upload_part(
            Bucket=self._store.place.bucket,
            Key=self._key,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=data,
            ChecksumCRC64NVME=crc,
        )
        compare_checksums(
            f"part {number} of {self._store.place}/{self.artifact.path}", answer.get("ChecksumCRC64NVME"), crc
        )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC64NVME": crc}
