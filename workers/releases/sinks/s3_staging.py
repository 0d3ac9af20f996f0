"""One attempt at a release in an S3 store: its shards wait as unfinished uploads, and manifest.json is created last."""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from botocore.exceptions import ClientError

from jobs.errors import DestinationOccupiedError, TransientIOError
from jobs.release import MANIFEST_NAME, Artifact, Manifest, Release
from workers.files.local import FileState
from workers.files.scratch import OwnedDirectory
from workers.releases.occupied import occupied
from workers.releases.released import ManifestFile, check_all_put, encode_manifest
from workers.releases.sinks import Receipt, Ticket
from workers.releases.sinks.local_records import LocalRecords
from workers.releases.sinks.s3_kept import S3Records
from workers.releases.sinks.s3_objects import Mark, StoredObject, StoredParts, create_whole, destination_digest, look_at
from workers.releases.sinks.s3_records import RECORDS, UploadRecord, abort_recorded
from workers.releases.sinks.s3_surroundings import delete_unnamed, find_release, own_below, refuse_above
from workers.releases.sinks.s3_upload import Upload
from workers.sources.s3_client import S3Store, error_status

_NUM_STREAMS = 8
_NUM_TRIES = 5
_PAUSE_SECONDS = 0.1
"""Before the second try; doubles with each one."""
_GONE, _CONFLICT, _EXISTS, _STORE_FAILED = 404, 409, 412, 500


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
        candidates: Collection[UploadRecord] = (),
        apart: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take what `S3Sink` has found.

        Args:
            store: the destination.
            owned: the scratch directory.
            leftovers: what a crash of an attempt at this destination left, by name.
            merge_key: of the release.
            attempt: marks the objects of this release on its way.
            candidates: uploads of dead attempts that may be finished shards.
            apart: whether the publishing worker does not see the directory, so that all bytes have to be at the store.
            sleep: waits some seconds.
        """
        self._store = store
        self._merge_key = merge_key
        self._attempt = attempt
        self._leftovers = leftovers
        self._owned = owned
        self._apart = apart
        self._sleep = sleep
        self.directory = owned.path
        self._uploads: dict[str, Upload] = {}
        self._etags: dict[str, str] = {}
        """Objects that are in their place."""
        self._placed: set[str] = set()
        """Those that were put there by this staging, whichever attempt's mark they bear."""
        self._others_put = False
        self._published = False
        self._in_doubt = False
        """Whether the manifest may still come to be, after a request whose answer never came."""
        self._local = LocalRecords(self.directory, merge_key, take=lambda _: None, drop=lambda _: None)
        self.records = S3Records(
            store,
            candidates,
            self._local,
            mark=self._mark,
            uploads=self._uploads,
            take=self._take_over,
            put=self.put,
            drop=self._drop,
        )

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
        self._uploads[path].is_recorded = True
        self._others_put = True
        if etag is not None:
            self._etags[path] = etag

    def publish(self, manifest: Manifest) -> Release:
        """Complete the uploads, and create `manifest.json` when all are in their place."""
        check_all_put(manifest, {path: upload.artifact for path, upload in self._uploads.items()})
        encoded = encode_manifest(manifest)
        if found := self._look():
            release = self._settle(found, encoded)
        else:
            refuse_above(self._store)
            self._place_all()
            self._clear_others()
            for path in self._touched():
                self._place(self._uploads[path])
            release = self._create_manifest(encoded)
        if release.created:
            self._repair()
            self._published = True
            if self._others_put:
                abort_recorded(self._store)  # of a process that died before it could hand them over
        return release

    def discard(self, *, keep: bool = False) -> bool:
        """Drop the uploads, and the objects of this attempt that no manifest names; leave the scratch directory."""
        try:
            for upload in self._uploads.values():
                if not (keep and upload.is_recorded):
                    upload.abort()
            # Without its objects, a manifest that comes to be late would be a release with nothing in it.
            if not (self._published or self._in_doubt):
                delete_unnamed(self._store, self._uploads.keys(), self._is_own)
        finally:
            left = self._local.let_go(self._owned, keep=keep)
        return left or keep or self.records.are_untouched

    def _take_over(self, artifact: Artifact, parts: StoredParts) -> Receipt | None:
        """Go on with an upload of a dead attempt, or with the object that it has become."""
        leftover = self._leftovers.get(artifact.path)
        upload = self._upload(artifact, parts)
        etag = leftover.etag if leftover and not parts.upload_id and upload.is_copy(leftover) else None
        if not parts.upload_id and etag is None:
            return None
        upload.is_recorded = True
        self._uploads[artifact.path] = upload
        if etag is not None:
            self._etags[artifact.path] = etag
        return Receipt(artifact=artifact, stored=(upload.parts, etag))

    def _drop(self, name: str) -> None:
        self._etags.pop(name, None)
        if upload := self._uploads.pop(name, None):
            upload.abort()

    def _mark(self, sha256: str) -> Mark:
        return Mark(
            destination=destination_digest(self._store),
            merge_key=self._merge_key,
            sha256=sha256,
            attempt=self._attempt,
        )

    def _is_of_release(self, found: StoredObject) -> bool:
        return self._mark("").is_same_release(found.mark)

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
        """Make one file visible, unless the same bytes are there; clear away what an attempt at this release left.

        A refusal is not believed: the object that is there may be our own, whose answer was lost, and a conflict says
        only that another request was on its way. What is there decides.
        """
        path = upload.artifact.path
        for number in range(_NUM_TRIES):
            with self._store.errors():
                try:
                    self._etags[path] = upload.complete()
                    self._placed.add(path)
                except ClientError as error:
                    if error_status(error) not in (_GONE, _CONFLICT, _EXISTS):
                        raise
                else:
                    return
            found = look_at(self._store, path)
            if found and upload.is_copy(found):  # of another publisher, or our own whose answer was lost
                self._etags[path] = found.etag
                return
            if found and not self._is_of_release(found):
                raise occupied(self._store.place, [path], "a file of others")
            if found:
                self._store.delete(path, found.etag)
            else:
                upload.abort()  # its parts are gone or in doubt; the next try sends them again
            self._sleep(_PAUSE_SECONDS * 2**number)
        raise TransientIOError(f"{self._store.place}/{path} changed again and again while it was published; try again")

    def _clear_others(self) -> None:
        """Delete what other attempts at this release left beyond its files; refuse what is not of this release."""
        for path, found in own_below(self._store, besides={*self._uploads, MANIFEST_NAME}).items():
            if not self._is_of_release(found) and not path.startswith(
                f"{RECORDS}/"
            ):  # its publisher will be stopped at a file we share, and clear it away
                raise TransientIOError(f"{self._store.place}/{path} is of another release on its way there; try again")
            self._store.delete(path, found.etag)

    def _create_manifest(self, manifest: ManifestFile) -> Release:
        self._in_doubt = True
        for number in range(_NUM_TRIES):
            with self._store.errors():
                try:
                    create_whole(self._store, MANIFEST_NAME, manifest.data, self._mark(manifest.sha256))
                except ClientError as error:
                    if (status := error_status(error)) not in (_CONFLICT, _EXISTS):
                        self._in_doubt = status >= _STORE_FAILED
                        raise
                else:
                    return manifest.release(self._store.place, created=True)
            if found := self._look():
                return self._settle(found, manifest)
            self._sleep(_PAUSE_SECONDS * 2**number)
        self._in_doubt = False
        raise TransientIOError(f"{self._store.place}/{MANIFEST_NAME} was written and deleted by others; try again")

    def _look(self) -> ManifestFile | None:
        """Return the manifest that is there. When there is one, ours will not come to be any more."""
        try:
            found = find_release(self._store)
        except DestinationOccupiedError:
            self._in_doubt = False
            raise
        if found is not None:
            self._in_doubt = False
        return found

    def _settle(self, found: ManifestFile, manifest: ManifestFile) -> Release:
        """Return the release that is there: created by this attempt whose answer was lost, or by another."""
        there = look_at(self._store, MANIFEST_NAME)
        if there and there.mark == self._mark(manifest.sha256):
            return manifest.release(self._store.place, created=True)
        return found.settle(self._store.place, self._merge_key)

    def _touched(self) -> list[str]:
        """Return the files that another publisher of this release has removed or replaced since they were placed."""
        objects = self._store.objects()
        return [path for path, etag in self._etags.items() if path not in objects or objects[path].etag != etag]

    def _repair(self) -> None:
        """Write again what another publisher of this release touched before it saw the manifest.

        Without the bytes, which a dead process had, there is no whole release: the manifest goes.
        """
        touched = self._touched()
        if lost := [path for path in touched if not self._uploads[path].is_here]:
            if there := look_at(self._store, MANIFEST_NAME):
                self._store.delete(MANIFEST_NAME, there.etag)
            self._in_doubt = False
            raise TransientIOError(f"{self._store.place}/{lost[0]} was removed by another publisher; merge again")
        for path in touched:
            self._place(self._uploads[path])

    def _is_own(self, path: str, found: StoredObject) -> bool:
        if found.mark is None or not self._is_of_release(found):
            return False
        return found.mark.attempt == self._attempt or path in self._placed
