"""Releases in an S3 store: shards wait there as unfinished uploads, and `manifest.json` is created last.

Objects are created, never overwritten: two publishers meet at the first file they share, or at the manifest. What a
crash leaves between the first file and the manifest is known by its marks: the same release uses it again, any other is
refused.
"""

import hashlib
import logging
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

from botocore.exceptions import ClientError

from jobs.errors import DestinationOccupiedError, TransientIOError
from jobs.locations import S3Prefix
from jobs.release import MANIFEST_NAME, Artifact, Manifest, Release
from workers.files import FileState, file_errors
from workers.released import ManifestFile, check_all_put, decode_existing, encode_manifest, occupied
from workers.s3_client import S3Store, error_status
from workers.scratch import OwnedDirectory, sweep
from workers.sinks import Receipt, Ticket
from workers.sinks.s3_upload import Mark, StoredObject, StoredParts, Upload, abort_unfinished, create_whole, look_at

_log = logging.getLogger(__name__)

_NUM_STREAMS = 8
_NUM_TRIES = 3
_GONE, _CONFLICT, _EXISTS = 404, 409, 412


class S3Sink:
    """A prefix of a bucket with nothing below it, or only what an earlier attempt left."""

    def __init__(self, location: S3Prefix, scratch: Path) -> None:
        self._store = S3Store(location)
        self._scratch = scratch

    def existing(self) -> Manifest | None:
        """Return the manifest of the release that is there, or None when the prefix is free."""
        if found := _find(self._store):
            return found.manifest
        _leftovers(self._store)
        return None

    def open(self, merge_key: str) -> "S3Staging":
        """Start a release. Aborts every unfinished upload below the prefix.

        Raises:
            DestinationOccupiedError: a crash left objects of another release there.
        """
        store = self._store
        _abort_unfinished(store)
        leftovers = _leftovers(store)
        others = [path for path, found in leftovers.items() if not _is_of(found, merge_key)]
        if others and _find(store) is None:
            raise occupied(store.place, others, "what a crash left of another release")
        return S3Staging(store, self._make_directory(), leftovers, merge_key=merge_key, attempt=secrets.token_hex(8))

    def join(self, ticket: Ticket) -> "S3Staging":
        """Take part, in the same scratch directory where this process sees it, else in one of its own."""
        with file_errors(f"joining the staging directory of {self._store.place}"):
            owned = OwnedDirectory.join(ticket.directory)
        return S3Staging(
            self._store,
            owned or self._make_directory(),
            _leftovers(self._store),
            merge_key=ticket.merge_key,
            attempt=ticket.attempt,
            apart=owned is None,
        )

    def _make_directory(self) -> OwnedDirectory:
        prefix = f"s3-{hashlib.sha256(str(self._store.place).encode()).hexdigest()[:16]}-"
        with file_errors(f"making a staging directory for {self._store.place}"):
            sweep(self._scratch, prefix)
            return OwnedDirectory.make(self._scratch, prefix)


class S3Staging:
    """Files in a scratch directory, and their parts at the store."""

    in_place = False

    def __init__(
        self,
        store: S3Store,
        owned: OwnedDirectory,
        leftovers: Mapping[str, StoredObject],
        *,
        merge_key: str,
        attempt: str,
        apart: bool = False,
    ) -> None:
        """Take what `S3Sink` has found.

        Args:
            store: the destination.
            owned: the scratch directory.
            leftovers: what a crash left below the prefix, by name.
            merge_key: of the release.
            attempt: marks the objects of this release on its way.
            apart: whether whoever publishes does not see the directory, so that all bytes have to be at the store.
        """
        self._store = store
        self._merge_key = merge_key
        self._attempt = attempt
        self._leftovers = leftovers
        self._owned = owned
        self._apart = apart
        self.directory = owned.path
        self._uploads: dict[str, Upload] = {}
        self._etags: dict[str, str] = {}
        """Objects that are in their place."""
        self._others_put = False
        self._published = False

    @property
    def ticket(self) -> Ticket:
        """What another process needs to take part."""
        return Ticket(directory=self.directory, attempt=self._attempt, merge_key=self._merge_key)

    def put(self, artifact: Artifact, hashed_as: FileState | None = None) -> Receipt:  # noqa: ARG002 - it reads the file
        """Check a file and store its parts; nothing is visible. What an earlier attempt left is not sent again."""
        if former := self._uploads.get(artifact.path):
            former.abort()
        upload = self._upload(artifact)
        self._uploads[artifact.path] = upload
        self._etags.pop(artifact.path, None)
        if leftover := self._leftovers.get(artifact.path):
            upload.check()
            if upload.is_copy(leftover):
                self._etags[artifact.path] = leftover.etag
                return Receipt(artifact=artifact, stored=(upload.parts, leftover.etag))
        upload.send()
        return Receipt(artifact=artifact, stored=(upload.parts, None))

    def take(self, receipt: Receipt) -> None:
        """Go on with an upload whose parts another process has stored."""
        path = receipt.artifact.path
        parts, etag = cast("tuple[StoredParts, str | None]", receipt.stored)
        self._uploads[path] = self._upload(receipt.artifact, parts)
        self._others_put = True
        if etag is not None:
            self._etags[path] = etag

    def publish(self, manifest: Manifest) -> Release:
        """Complete the uploads, and create `manifest.json` when all are in their place."""
        check_all_put(manifest, {path: upload.artifact for path, upload in self._uploads.items()})
        if found := _find(self._store):
            return found.settle(self._store.place, self._merge_key)
        for path in self._leftovers.keys() - self._uploads.keys():
            self._store.delete(path)
        self._place_all()
        release = self._create_manifest(encode_manifest(manifest))
        if release.created:
            self._repair()
            self._published = True
            if self._others_put:
                _abort_unfinished(self._store)  # of a process that died before it could hand them over
        return release

    def discard(self) -> None:
        """Drop the uploads, and the objects of this attempt that no manifest names; leave the scratch directory."""
        try:
            for upload in self._uploads.values():
                upload.abort()
            if not self._published:
                self._delete_own()
        finally:
            self._owned.leave()

    def _mark(self, sha256: str) -> Mark:
        return Mark(merge_key=self._merge_key, sha256=sha256, attempt=self._attempt)

    def _upload(self, artifact: Artifact, parts: StoredParts | None = None) -> Upload:
        path, mark = self.directory / artifact.path, self._mark(artifact.sha256)
        return Upload(self._store, path, artifact, mark, parts=parts, always_in_parts=self._apart)

    def _place_all(self) -> None:
        """Make every file visible.

        Small files go one by one, in order of their names: of two publishers with different releases one is stopped
        at the first name they share, before any of its shards is visible. The shards follow a few at a time.
        """
        pending = [upload for path, upload in sorted(self._uploads.items()) if path not in self._etags]
        for upload in pending:
            if not upload.in_parts:
                self._place(upload)
        with ThreadPoolExecutor(_NUM_STREAMS, thread_name_prefix="s3-complete") as pool:
            list(pool.map(self._place, [upload for upload in pending if upload.in_parts]))

    def _place(self, upload: Upload) -> None:
        """Make one file visible, unless the same bytes are there; clear away what an attempt at this release left."""
        path = upload.artifact.path
        for _ in range(_NUM_TRIES):
            with self._store.errors():
                try:
                    self._etags[path] = upload.complete()
                except ClientError as error:
                    if error_status(error) not in (_GONE, _CONFLICT, _EXISTS):
                        raise
                else:
                    return
            found = look_at(self._store, path)
            if found and upload.is_copy(found):  # of another publisher, or our own whose answer was lost
                self._etags[path] = found.etag
                return
            if found and not _is_of(found, self._merge_key):
                raise occupied(self._store.place, [path], "a file of somebody else")
            if found:
                self._store.delete(path)
            else:
                upload.abort()  # its parts are gone or in doubt; the next try sends them again
        raise TransientIOError(f"{self._store.place}/{path} changed again and again while it was published; try again")

    def _create_manifest(self, manifest: ManifestFile) -> Release:
        with self._store.errors():
            try:
                create_whole(self._store, MANIFEST_NAME, manifest.data, self._mark(manifest.sha256))
            except ClientError as error:
                if error_status(error) not in (_CONFLICT, _EXISTS):
                    raise
            else:
                return manifest.release(self._store.place, created=True)
        there = look_at(self._store, MANIFEST_NAME)
        if there and there.mark and there.mark.attempt == self._attempt:  # created, but the answer was lost
            return manifest.release(self._store.place, created=True)
        if found := _find(self._store):
            return found.settle(self._store.place, self._merge_key)
        raise TransientIOError(f"{self._store.place}/{MANIFEST_NAME} was written and deleted by others; try again")

    def _repair(self) -> None:
        """Write again what another publisher of this release touched before it saw the manifest."""
        objects = self._store.objects()
        for path, etag in list(self._etags.items()):
            if path not in objects or objects[path].etag != etag:
                self._place(self._uploads[path])

    def _delete_own(self) -> None:
        try:
            found = _find(self._store)
        except DestinationOccupiedError:  # a manifest that is not ours names nothing of ours
            found = None
        named = {artifact.path for artifact in found.manifest.files} if found else set()
        for path in self._uploads.keys() - named:
            there = look_at(self._store, path)
            if there and there.mark and there.mark.attempt == self._attempt:
                self._store.delete(path)


def _is_of(found: StoredObject, merge_key: str) -> bool:
    return found.mark is not None and found.mark.merge_key == merge_key


def _abort_unfinished(store: S3Store) -> None:
    if num_aborted := abort_unfinished(store):
        _log.info("aborted unfinished uploads", extra={"place": str(store.place), "uploads": num_aborted})


def _find(store: S3Store) -> ManifestFile | None:
    data = store.content(MANIFEST_NAME)
    return None if data is None else decode_existing(data, store.place)


def _leftovers(store: S3Store) -> dict[str, StoredObject]:
    """Return what a crash left below the prefix, by name.

    Raises:
        DestinationOccupiedError: there is something that is not ours.
    """
    leftovers = {}
    for path in store.objects():
        found = look_at(store, path)
        if found and found.mark is None:
            raise occupied(store.place, [path], f"files, but no {MANIFEST_NAME}")
        if found:
            leftovers[path] = found
    return leftovers
