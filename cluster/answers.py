"""What the driver does with what workers say: move jobs on, have them published, end their attempts."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.events import DriverEvent, WorkerReplaced
from cluster.holdings import Held, Holdings
from cluster.metrics import FleetMetrics
from cluster.pool import WorkerPool
from cluster.replies import CallFailed, PoolEvent, ProgressSeen, PublishFinished, UnitFinished, WorkerLost
from cluster.settlement import Settlement
from jobs.errors import FailureClass
from jobs.states import STAGES, JobState
from jobs.store import ProgressReport
from workers.outcomes import Failure, JobOutcome, Progress, PublishOutcome

logger = logging.getLogger(__name__)

_STATE_OF_STAGE = {
    "fetch": JobState.PLANNING,
    "plan": JobState.PLANNING,
    "quantize": JobState.MERGING,
    "merge": JobState.MERGING,
    "verify": JobState.VERIFYING,
    "compare": JobState.VERIFYING,
    "staged": JobState.VERIFYING,
}
"""Stages of a worker that move a job on; what follows from the others, the answers of the worker say."""


class AnswerHandler:
    """Handles the events of a pool. An event that a store fault cut short can be handled again."""

    def __init__(
        self,
        holdings: Holdings,
        pool: WorkerPool,
        settlement: Settlement,
        metrics: FleetMetrics,
        listener: Callable[[DriverEvent], None],
    ) -> None:
        """Take what it reads and calls.

        Args:
            holdings: which job is on which worker.
            pool: told to publish, discard and cancel.
            settlement: writes to the store.
            metrics: counts units, bytes, seconds and deaths.
            listener: told of lost workers.
        """
        self._holdings = holdings
        self._pool = pool
        self._settlement = settlement
        self._metrics = metrics
        self._listener = listener
        self._progress: dict[str, tuple[Held, ProgressReport]] = {}

    def handle(self, event: PoolEvent) -> None:
        """Act on one event.

        Raises:
            TransientIOError, NoCapacityError: the store cannot take it now; handle the event again.
        """
        match event:
            case ProgressSeen():
                self._follow(event.worker, event.progress)
            case UnitFinished():
                self._take_all(event.worker, event.outcome.jobs)
                self._fail_unanswered(event.worker)
                self._metrics.unit_finished(event.outcome)
            case PublishFinished():
                self._take_published(event.worker, event.outcome)
                self._metrics.publish_finished(event.outcome)
            case CallFailed():
                self._take_fault(event)
            case WorkerLost():
                self._take_loss(event)
                self._metrics.worker_lost()

    def _follow(self, worker: str, progress: Progress) -> None:
        """Move the jobs of a unit on, and note how far they are; each has its share of the unit's bytes."""
        told = {
            held.job_id: held
            for held in self._holdings.at_work(worker)
            if held.job_id in progress.stages and not held.cancel_sent
        }
        ended: set[str] = set()
        for state in STAGES:
            jobs = [held for job_id, held in told.items() if _STATE_OF_STAGE.get(progress.stages[job_id]) is state]
            ended |= {held.job_id for held in jobs} - self._settlement.advance(jobs, state)
        if ended:
            self._pool.cancel(worker, sorted(ended))
        num_jobs = len(progress.stages)
        for job_id in told.keys() - ended:
            report = ProgressReport(
                job_id=job_id,
                token=told[job_id].lease.token,
                stage=progress.stages[job_id],
                bytes_done=progress.bytes_done // num_jobs,
                bytes_total=progress.bytes_total // num_jobs,
            )
            self._progress[job_id] = told[job_id], report

    def write_progress(self) -> None:
        """Write down how far the work is that was told of since the last time: all of it at once.

        Raises:
            TransientIOError, NoCapacityError: the store cannot take it now; nothing is lost by it.
        """
        reports, self._progress = self._progress, {}
        held = {job_id: told for job_id, told in reports.items() if job_id in self._holdings.tokens}
        if held:
            self._settlement.note_progress(held)

    def _take_all(self, worker: str, outcomes: Sequence[JobOutcome]) -> None:
        """Act on what became of the jobs of a unit."""
        staged: dict[str, tuple[Held, JobOutcome]] = {}
        for outcome in outcomes:
            held = self._holdings.find(worker, outcome.job_id)
            if held is not None and held.outcome is not None:
                continue  # this event is handled for the second time
            if held is not None and outcome.failure is None and outcome.release is None:
                staged[outcome.job_id] = held, outcome
                continue
            if held is not None:
                self._settle(held, outcome)
            self._pool.discard(worker, outcome.job_id)
        # The fence: only the holders of the current tokens come past this.
        merge_keys = {job_id: outcome.merge_key for job_id, (_, outcome) in staged.items()}
        passed = self._settlement.advance((held for held, _ in staged.values()), JobState.PUBLISHING, merge_keys)
        for job_id, (held, outcome) in staged.items():
            if job_id in passed:
                held.outcome = outcome
                self._pool.publish(worker, job_id)
            else:
                self._pool.discard(worker, job_id)

    def _settle(self, held: Held, outcome: JobOutcome) -> None:
        """End a job that failed, or whose release was there already."""
        report_path = _text(outcome.report_path)
        if outcome.failure is not None:
            self._settlement.failure(held, outcome.failure, report_path)
        elif outcome.release is not None:
            self._settlement.release(held, outcome.release, report_path)

    def _take_published(self, worker: str, outcome: PublishOutcome) -> None:
        held = self._holdings.find(worker, outcome.job_id)
        if held is not None and held.outcome is not None:
            report_path = _text(held.outcome.report_path)
            if outcome.release is not None:
                self._settlement.release(held, outcome.release, report_path)
            elif outcome.failure is not None:
                self._settlement.failure(held, outcome.failure, report_path)
        self._pool.discard(worker, outcome.job_id)

    def _fail_unanswered(self, worker: str) -> None:
        """Fail the jobs of a finished unit that its outcome does not name, rather than wait for them forever."""
        for held in self._holdings.at_work(worker):
            self._settlement.failure(held, _fault(f"{worker} returned no outcome for it"))

    def _take_fault(self, event: CallFailed) -> None:
        """Turn an exception that came out of a worker into the failure of the jobs it was about."""
        logger.error("call failed", extra={"worker": event.worker, "call": event.call, "reason": event.message})
        if event.call not in ("run_unit", "publish"):
            return
        for held in self._holdings.on_worker(event.worker):
            if event.job_id in (None, held.job_id):
                self._settlement.failure(held, _fault(f"{event.call} on {event.worker} raised: {event.message}"))
                self._pool.discard(event.worker, held.job_id)

    def _take_loss(self, event: WorkerLost) -> None:
        jobs = self._holdings.on_worker(event.worker)
        ids = tuple(held.job_id for held in jobs)
        self._listener(WorkerReplaced(worker=event.worker, reason=event.reason, job_ids=ids))
        failure = Failure(
            failure_class=FailureClass.WORKER_LOST,
            retryable=True,
            message=f"{event.worker} was lost with {len(jobs)} job(s): {event.reason}",
        )
        for held in jobs:
            self._settlement.failure(held, failure)


def _fault(message: str) -> Failure:
    return Failure(
        failure_class=FailureClass.INTERNAL, retryable=False, message=f"{message}; this is a fault of mergefleet"
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
