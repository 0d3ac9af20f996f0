"""The worker: takes units of requests as far as staging, and publishes on the word. Knows nothing of what runs it."""

import logging
import socket
import threading
import time
from collections.abc import Mapping

from jobs.errors import InternalError
from jobs.request import MergeRequest
from workers.bases.resident_bases import ResidentBases
from workers.files.collector import pass_over_modules
from workers.merging.base_plan import PlannedBases
from workers.merging.failures import own_failure, shared_failures
from workers.merging.job import Job
from workers.merging.outcomes import (
    Failure,
    JobOutcome,
    MergedShards,
    PassOpened,
    PassWork,
    Piece,
    Progress,
    PublishOutcome,
    Readiness,
    ShardsOutcome,
    UnitOutcome,
    Unreachable,
)
from workers.merging.settings import WorkerSettings
from workers.merging.tracker import Tracker
from workers.numerics.device import device_fault
from workers.unit.unit import Unit
from workers.unit.vetting import server

logger = logging.getLogger(__name__)


class MergeWorker:
    """Merges units of requests. One unit at a time; `progress` and `cancel` may be called meanwhile from elsewhere."""

    def __init__(self, settings: WorkerSettings) -> None:
        server.start()  # beside what comes first; where there is one thread still, a fork of this process
        pass_over_modules()
        self._settings = settings
        self._planned = PlannedBases()
        self._residents = ResidentBases(settings.resident_bytes)
        self._cancelled: frozenset[str] = frozenset()
        self._tracker = Tracker("", (), lambda: self._cancelled)
        self._staged: dict[str, Job] = {}
        self._passes: dict[str, Unit] = {}
        """Passes this worker takes part in; what is known of them here, the next call could find out again."""
        self._lock = threading.Lock()

    def ready(self) -> Readiness:
        """Say whether this worker can use its device; it is to get no work when it cannot."""
        return Readiness(host=socket.gethostname(), fault=device_fault(self._settings.device))

    def run_unit(self, name: str, requests: tuple[MergeRequest, ...]) -> UnitOutcome:
        """Plan, merge, verify and stage requests that share a pass key.

        Args:
            name: of the unit, for people.
            requests: with different ids; merged in one pass over their base.

        Returns:
            What became of each job. Staged ones wait for `publish` or `discard`; of all others nothing is left.
        """
        unit = self._begin(name, requests)
        with shared_failures(unit.jobs):
            unit.run()
        return self._stage(unit)

    def open_pass(self, pass_id: str, name: str, requests: tuple[MergeRequest, ...]) -> PassOpened:
        """Plan requests that share a pass key, and start their releases, for several workers to go on with.

        Args:
            pass_id: names the pass in further calls, here and on other workers.
            name: of the pass, for people.
            requests: as `run_unit` takes them.

        Returns:
            What can be merged apart. `merge_shards`, on any worker, does so; `finish_pass`, on one, ends it.
        """
        unit = self._passes[pass_id] = self._begin(name, requests)
        pieces: tuple[Piece, ...] = ()
        with shared_failures(unit.jobs):
            unit.open()
            pieces = unit.pieces()
        ended = self._end_failed(unit)
        return PassOpened(
            ended=ended,
            tickets={job.id: job.staging.ticket for job in unit.jobs},
            pieces=pieces,
            resumed={job.id: job.resumed for job in unit.jobs if job.resumed is not None},
            bytes_total=unit.tracker.progress().bytes_total,
            usage=unit.usage(),
        )

    def merge_shards(self, work: PassWork, shards: frozenset[str]) -> ShardsOutcome | Unreachable:
        """Merge, verify and ship some shards of a pass that was opened here or on another worker.

        Args:
            work: on which pass.
            shards: of whole pieces.
        """
        unit = self._join(work)
        if isinstance(unit, Unreachable):
            return unit
        merged: Mapping[str, MergedShards] = {}
        with shared_failures(unit.jobs):
            merged = unit.merge(shards, work.finished)
        ended = self._end_failed(unit)
        self._residents.trim()
        return ShardsOutcome(
            merged={job.id: merged[job.id] for job in unit.jobs if job.id in merged},
            ended=ended,
            usage=unit.usage(),
            residents=self._residents.keys,
        )

    def finish_pass(self, work: PassWork, merged: Mapping[str, tuple[MergedShards, ...]]) -> UnitOutcome | Unreachable:
        """Do what is left once all shards are merged: behaviour, reports, manifests.

        Args:
            work: on which pass.
            merged: by job, what all workers have answered.

        Returns:
            As `run_unit`.
        """
        unit = self._join(work)
        if isinstance(unit, Unreachable):
            return unit
        with shared_failures(unit.jobs):
            unit.finish(merged)
        del self._passes[work.pass_id]
        return self._stage(unit)

    def _begin(self, name: str, requests: tuple[MergeRequest, ...]) -> Unit:
        for request in requests:
            self.discard(request.id)  # left by an attempt that was abandoned
        with self._lock:
            self._cancelled = frozenset()  # what was cancelled before may be asked for again
        self._tracker = Tracker(name, (request.id for request in requests), lambda: self._cancelled)
        logger.info("unit begun", extra={"unit": name, "job_ids": [request.id for request in requests]})
        jobs = [Job(request) for request in requests]
        return Unit(self._settings, self._planned, self._residents, self._tracker, jobs)

    def _join(self, work: PassWork) -> Unit | Unreachable:
        """Return the pass as this worker knows it."""
        if work.pass_id in self._passes:
            unit = self._passes[work.pass_id]
            wanted = {request.id for request in work.requests}
            for job in [job for job in unit.jobs if job.id not in wanted]:
                self._leave(unit, job)
            self._tracker = unit.tracker
            self._tracker.rename(work.name)
            return unit
        unit = self._begin(work.name, work.requests)
        with shared_failures(unit.jobs):
            unit.join(work.tickets)
        # The pass was opened, so its requests are good: what goes wrong now is a matter of this worker's.
        if failed := [job for job in unit.jobs if not job.running]:
            for job in list(unit.jobs):
                self._leave(unit, job)
            return Unreachable(reason=str(failed[0].error))
        self._passes[work.pass_id] = unit
        return unit

    def _leave(self, unit: Unit, job: Job, *, keep: bool = False) -> None:
        job.drop(keep=keep)
        unit.jobs.remove(job)

    def _forget_empty(self) -> None:
        self._passes = {pass_id: unit for pass_id, unit in self._passes.items() if unit.jobs}

    def _end_failed(self, unit: Unit) -> tuple[JobOutcome, ...]:
        """Let go of the jobs of a pass that have come to an end, and return what became of them."""
        ended = [job for job in unit.jobs if not job.running]
        for job in ended:
            self._end(job)
            self._leave(unit, job)
        self._forget_empty()
        return tuple(job.outcome() for job in ended)

    def _stage(self, unit: Unit) -> UnitOutcome:
        """Keep what is ready to be published, and drop the rest."""
        for job in unit.jobs:
            if job.running:
                self._staged[job.id] = job
                self._tracker.enter("staged", [job.id])
            else:
                self._end(job)
                job.drop()
        self._residents.trim()
        usage = unit.usage()
        took = {stage: round(seconds, 3) for stage, seconds in usage.seconds.items()}
        logger.info("unit done", extra={"seconds": took, "job_ids": [job.id for job in unit.jobs]})
        return UnitOutcome(jobs=tuple(job.outcome() for job in unit.jobs), usage=usage, residents=self._residents.keys)

    def _end(self, job: Job) -> None:
        """Say what became of a job for which nothing more is done here."""
        failure = Failure.of(job.error) if job.error else None
        if failure is not None:
            said = {"job_id": job.id, "failure": failure.failure_class.value, "reason": failure.message}
            logger.warning("job failed", extra=said | ({"place": failure.place} if failure.place else {}))
        self._tracker.enter("failed" if failure else "published", [job.id])

    def publish(self, job_id: str, approved_by: str | None = None) -> PublishOutcome:
        """Make one staged job visible. Afterwards nothing of it is left here, published or failed.

        Args:
            job_id: of the job.
            approved_by: the person who let it be, where its request asks for one.
        """
        begin = time.perf_counter()
        job = self._staged.pop(job_id, None)
        if job is None:
            error = InternalError(f"job {job_id} is not staged here: it was published, discarded, or never got so far")
            return PublishOutcome(job_id=job_id, failure=Failure.of(error))
        self._tracker.enter("publish", [job_id])
        with own_failure(job):
            job.publish(approved_by)
        job.drop()
        self._end(job)
        return PublishOutcome(
            job_id=job_id,
            failure=Failure.of(job.error) if job.error else None,
            release=job.release,
            seconds=time.perf_counter() - begin,
        )

    def leave(self, job_id: str) -> None:
        """Let go of a job that is staged, or in a pass; its finished shards stay for the attempt that will publish it.

        Idempotent.
        """
        self._let_go(job_id, keep=True)

    def discard(self, job_id: str) -> None:
        """Drop a job that is staged, or in a pass, and everything it left. Idempotent."""
        self._let_go(job_id, keep=False)

    def _let_go(self, job_id: str, *, keep: bool) -> None:
        job = self._staged.pop(job_id, None)
        if job is not None:
            job.drop(keep=keep)
        for unit in self._passes.values():
            for each in [each for each in unit.jobs if each.id == job_id]:
                self._leave(unit, each, keep=keep)
        self._forget_empty()

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
        """Drop every job."""
        for job_id in [*self._staged, *(job.id for unit in self._passes.values() for job in unit.jobs)]:
            self.discard(job_id)
