"""The worker: takes units of requests as far as staging, and publishes on the word. Knows nothing of what runs it."""

import threading
import time

from jobs.errors import InternalError
from jobs.request import MergeRequest
from workers.job import Job, own_failure, shared_failures
from workers.outcomes import Failure, Progress, PublishOutcome, UnitOutcome, WorkerSettings
from workers.progress import Tracker
from workers.quantized_base import ResidentBases
from workers.unit import Unit


class MergeWorker:
    """Merges units of requests. One unit at a time; `progress` and `cancel` may be called meanwhile from elsewhere."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._residents = ResidentBases(settings.resident_bytes)
        self._cancelled: frozenset[str] = frozenset()
        self._tracker = Tracker("", (), lambda: self._cancelled)
        self._staged: dict[str, Job] = {}
        self._lock = threading.Lock()

    def run_unit(self, name: str, requests: tuple[MergeRequest, ...]) -> UnitOutcome:
        """Plan, merge, verify and stage requests that share a pass key.

        Args:
            name: of the unit, for people.
            requests: with different ids; merged in one pass over their base.

        Returns:
            What became of each job. Staged ones wait for `publish` or `discard`; of all others nothing is left.
        """
        for request in requests:
            self.discard(request.id)  # left by an attempt that nobody came back for
        with self._lock:
            self._cancelled = frozenset()  # what was cancelled before may be asked for again
        self._tracker = Tracker(name, (request.id for request in requests), lambda: self._cancelled)
        jobs = [Job(request) for request in requests]
        unit = Unit(self._settings, self._residents, self._tracker, jobs)
        with shared_failures(jobs):
            unit.run()
        for job in jobs:
            if job.running:
                self._staged[job.id] = job
                self._tracker.enter("staged", [job.id])
            else:
                self._tracker.enter("failed" if job.error else "published", [job.id])
                job.drop()
        self._residents.trim()
        return UnitOutcome(
            jobs=tuple(job.outcome() for job in jobs), usage=unit.usage(), residents=self._residents.keys
        )

    def publish(self, job_id: str) -> PublishOutcome:
        """Make one staged job visible; afterwards nothing of it is left here, whatever came of it."""
        begin = time.perf_counter()
        job = self._staged.pop(job_id, None)
        if job is None:
            error = InternalError(f"job {job_id} is not staged here: it was published, discarded, or never got so far")
            return PublishOutcome(job_id=job_id, failure=Failure.of(error))
        self._tracker.enter("publish", [job_id])
        assert job.manifest is not None
        with own_failure(job):
            job.release = job.staging.publish(job.manifest)
        job.drop()
        self._tracker.enter("failed" if job.error else "published", [job_id])
        return PublishOutcome(
            job_id=job_id,
            failure=Failure.of(job.error) if job.error else None,
            release=job.release,
            seconds=time.perf_counter() - begin,
        )

    def discard(self, job_id: str) -> None:
        """Drop a staged job and everything it left. Idempotent."""
        job = self._staged.pop(job_id, None)
        if job is not None:
            job.drop()

    def progress(self) -> Progress:
        """Return where the unit in work is; safe from any thread."""
        return self._tracker.progress()

    def cancel(self, job_ids: frozenset[str]) -> None:
        """Ask for jobs of the unit in work to stop; noticed within a tile of the merge. Safe from any thread."""
        with self._lock:
            self._cancelled |= job_ids

    def residents(self) -> tuple[str, ...]:
        """Return the pass keys of the bases held, least recently used first."""
        return self._residents.keys

    def close(self) -> None:
        """Drop every staged job."""
        for job_id in list(self._staged):
            self.discard(job_id)
