"""Finished shards that wait at an S3 store as unfinished uploads, and what a later attempt needs to use them again."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from jobs.errors import InternalError
from jobs.release import Artifact
from workers.releases.records import MAX_RECORD_BYTES, RecordedUpload, ShardRecord, decode_record, encode_record
from workers.releases.sinks import Receipt
from workers.releases.sinks.local_records import LocalRecords
from workers.releases.sinks.s3_objects import Mark, StoredParts
from workers.releases.sinks.s3_records import (
    StoredPart,
    UploadRecord,
    abort_all,
    begin_record,
    end_record,
    fill_record,
    is_of_release,
    parts_of,
    read_record,
    recorded,
)
from workers.releases.sinks.s3_surroundings import find_release
from workers.releases.sinks.s3_upload import Upload
from workers.sources.s3_client import S3Store


def find_candidates(store: S3Store, merge_key: str) -> tuple[UploadRecord, ...]:
    """Return recorded uploads that may be finished shards of a release; all others of this destination are aborted."""
    candidates, others = list[UploadRecord](), list[UploadRecord]()
    for record in recorded(store):
        with store.errors():
            is_filled = is_of_release(record.attempt, merge_key) and parts_of(
                store, record.record_name, record.record_id
            )
        (candidates if is_filled else others).append(record)
    abort_all(store, others)
    return tuple(candidates)


class S3Records:
    """Records at the store, and in the scratch directory where there is one."""

    def __init__(
        self,
        store: S3Store,
        candidates: Collection[UploadRecord],
        local: LocalRecords,
        *,
        mark: Callable[[str], Mark],
        uploads: Mapping[str, Upload],
        take: Callable[[Artifact, StoredParts], Receipt | None],
        put: Callable[[Artifact], Receipt],
        drop: Callable[[str], None],
    ) -> None:
        """Start with what dead attempts have left.

        Args:
            store: the destination.
            candidates: uploads that may be finished shards.
            local: records in the scratch directory.
            mark: returns a mark of this attempt, for a SHA-256.
            uploads: of the staging, by name.
            take: takes over an upload, or an object it became; None where neither is there.
            put: puts a file of the directory.
            drop: gives up a file that was taken over or put.
        """
        self._store = store
        self._waiting = list(candidates)
        self._local = local
        self._mark = mark
        self._uploads = uploads
        self._take = take
        self._put = put
        self._drop = drop
        self._found: dict[str, tuple[ShardRecord, UploadRecord]] = {}
        self._is_cleared = False

    @property
    def are_untouched(self) -> bool:
        """Whether uploads were left that no one has claimed or cleared."""
        return bool(self._waiting or self._found) and not self._is_cleared

    def gather(self, dead: Path) -> None:
        """Move finished shards from the scratch directory of a dead staging into this one's."""
        self._local.gather(dead)

    def keep(self, record: ShardRecord) -> None:
        """Write a record beside the file, and beside its parts."""
        self._local.keep(record)
        upload = self._uploads.get(record.artifact.path)
        if upload is not None and (parts := upload.recorded) is not None:
            upload.record(encode_record(record.model_copy(update={"upload": parts})))

    def left(self) -> tuple[ShardRecord, ...]:
        """Read what is recorded at the store, and abort what cannot be used."""
        with self._store.errors():
            while self._waiting:
                self._read(self._waiting.pop())
        at_store = {name: record for name, (record, _) in self._found.items()}
        local = {record.artifact.path: record for record in self._local.left()}
        return tuple((local | at_store).values())

    def claim(self, record: ShardRecord, *, whole: bool) -> Receipt | None:
        """Take over parts that are those of the record, or put the file again where it is here."""
        name = record.artifact.path
        if whole and not self._local.has(record.artifact):
            return None
        if name in self._found:
            receipt = self._take_parts(*self._found[name]) if self._found[name][0] == record else None
            if receipt is not None:
                return receipt
        if not self._local.has(record.artifact):
            return None
        if name in self._found:
            abort_all(self._store, [self._found.pop(name)[1]])
        try:
            return self._put(record.artifact)
        except InternalError:  # written to since it was hashed
            return None

    def clear(self, besides: Collection[str] = ()) -> None:
        """Abort and remove what was left, but some shards."""
        self._is_cleared = True
        self._local.clear(besides)
        unused = [name for name in self._found if name not in besides]
        for name in unused:
            self._drop(name)
        abort_all(self._store, [*self._waiting, *(self._found.pop(name)[1] for name in unused)])
        self._waiting.clear()

    def _read(self, candidate: UploadRecord) -> None:
        """Read one record, and put it into one of this attempt's own: no upload is ever without."""
        store = self._store
        mark = self._mark(hashlib.sha256(candidate.name.encode()).hexdigest())
        record_id = begin_record(store, mark, candidate.name, candidate.upload_id)
        own = UploadRecord(
            attempt=mark.attempt, upload_id=candidate.upload_id, name=candidate.name, record_id=record_id
        )
        # With a manifest there, nothing may appear beside it.
        data = None if find_release(store) else read_record(store, candidate, MAX_RECORD_BYTES)
        end_record(store, candidate)
        record = decode_record(data or b"", mark.merge_key)
        is_usable = record is not None and record.upload is not None and record.artifact.path == candidate.name
        if record is None or not is_usable or candidate.name in self._found:
            abort_all(store, [own])
        else:
            fill_record(store, own, data or b"")
            self._found[candidate.name] = record, own

    def _take_parts(self, record: ShardRecord, own: UploadRecord) -> Receipt | None:
        assert record.upload is not None
        with self._store.errors():
            found = parts_of(self._store, own.name, own.upload_id)
        if found is None:  # it was completed: the object tells its own checksum, and needs no record
            receipt = self._take(
                record.artifact, StoredParts(upload_id="", record_id="", parts=(), crc=record.upload.crc)
            )
            if receipt is not None:
                abort_all(self._store, [self._found.pop(own.name)[1]])
            return receipt
        if not _are_same(found, record.upload, record.artifact.num_bytes):
            return None
        parts = StoredParts(
            upload_id=own.upload_id,
            record_id=own.record_id,
            parts=tuple(
                {"PartNumber": part.number, "ETag": part.etag, "ChecksumCRC64NVME": part.crc}
                for part in record.upload.parts
            ),
            crc=record.upload.crc,
        )
        return self._take(record.artifact, parts)


def _are_same(found: Mapping[int, list[StoredPart]], upload: RecordedUpload, num_bytes: int) -> bool:
    """Whether the parts that a store lists are those it answered when they were sent, and no others."""
    expected = {part.number: part for part in upload.parts}
    return (
        found.keys() == expected.keys()
        and all(
            stored.etag == expected[number].etag and stored.crc in (None, expected[number].crc)
            for number, listed in found.items()
            for stored in listed
        )
        and sum(listed[0].num_bytes for listed in found.values()) == num_bytes
    )
