"""Releases in an S3 store: shards wait there as unfinished uploads, and `manifest.json` is created last.

Objects are created, never overwritten: two publishers meet at the first file they share, or at the manifest. What a
crash leaves between the first file and the manifest is known by its marks, which name destination, release and attempt:
the same release at the same destination uses it again, any other is refused. Nothing else is ever touched.
"""

import hashlib
from pathlib import Path

from jobs.locations import S3Prefix
from jobs.release import Manifest
from workers.files.local import file_errors
from workers.files.scratch import OwnedDirectory, sweep
from workers.releases.occupied import is_taken, occupied
from workers.releases.sinks import Ticket
from workers.releases.sinks.local_records import sweep_unused
from workers.releases.sinks.s3_kept import find_candidates
from workers.releases.sinks.s3_records import RECORDS, abort_all, abort_recorded, new_attempt, recorded
from workers.releases.sinks.s3_staging import S3Staging
from workers.releases.sinks.s3_surroundings import attempt_below, find_release, own_below, refuse_above
from workers.sources.s3_client import S3Store


class S3Sink:
    """A prefix of a bucket with nothing below it, or only what an earlier attempt left."""

    def __init__(self, location: S3Prefix, scratch: Path) -> None:
        self._store = S3Store(location)
        self._scratch = scratch

    def existing(self) -> Manifest | None:
        """Return the manifest of the release that is there, or None when the prefix is free."""
        if found := find_release(self._store):
            return found.manifest
        own_below(self._store)
        return None

    def open(self, merge_key: str) -> S3Staging:
        """Start a release. Aborts the unfinished uploads that earlier attempts at this destination have recorded.

        Those of the same release that are whole and checked stay, in the `records` of the staging.

        Raises:
            DestinationOccupiedError: there are files that are not ours, or a crash left those of another release; or
                a release lies above or below.
        """
        store = self._store
        refuse_above(store)
        leftovers = {} if find_release(store) else own_below(store)
        for path in [path for path in leftovers if path.startswith(f"{RECORDS}/")]:  # of a kill while it was read
            store.delete(path, leftovers.pop(path).etag)
        others = [path for path, found in leftovers.items() if found.mark and found.mark.merge_key != merge_key]
        if others:
            raise occupied(store.place, others, "what a crash left of another release")
        candidates = find_candidates(store, merge_key)
        attempt = new_attempt(merge_key)
        owned = self._make_directory()
        staging = S3Staging(store, owned, leftovers, merge_key=merge_key, attempt=attempt, candidates=candidates)
        self._sweep(staging)
        return staging

    def join(self, ticket: Ticket) -> S3Staging:
        """Take part, in the same scratch directory where this process sees it, else in one of its own."""
        leftovers = {} if find_release(self._store) else own_below(self._store)
        with file_errors(f"joining the staging directory of {self._store.place}"):
            owned = OwnedDirectory.join(ticket.directory)
        staging = S3Staging(
            self._store,
            owned or self._make_directory(),
            leftovers,
            merge_key=ticket.merge_key,
            attempt=ticket.attempt,
            apart=owned is None,
        )
        if owned is None:
            self._sweep(staging)
        return staging

    def clear(self, attempt: str | None, *, unused: bool) -> bool:
        """Remove the scratch directories of the dead, and what is at the store of the attempt, while it is of no use.

        Nothing at the store tells the living: beside a release, all unfinished uploads of this destination are aborted.
        """
        store = self._store
        is_over = is_taken(lambda: find_release(store))
        with file_errors(f"sweeping staging directories for {store.place}"):
            is_clear = sweep_unused(self._scratch, self._prefix, over=is_over)
        if is_over:
            abort_recorded(store)
            return True
        uploads = [record for record in recorded(store) if record.attempt == attempt]
        objects = attempt_below(store, attempt)
        if not unused:
            return is_clear and not uploads and not objects
        abort_all(store, uploads)
        for path, found in objects.items():
            store.delete(path, found.etag)
        return True  # what waits in the scratch directory goes with the sweep of that

    @property
    def _prefix(self) -> str:
        return f"s3-{hashlib.sha256(str(self._store.place).encode()).hexdigest()[:16]}-"

    def _make_directory(self) -> OwnedDirectory:
        with file_errors(f"making a staging directory for {self._store.place}"):
            return OwnedDirectory.make(self._scratch, self._prefix)

    def _sweep(self, staging: S3Staging) -> None:
        with file_errors(f"sweeping staging directories for {self._store.place}"):
            sweep(self._scratch, self._prefix, gather=staging.records.gather)
