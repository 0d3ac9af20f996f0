"""What the driver does with what workers say: move jobs on, have them published, end their attempts."""

import logging
from collections.abc import Callable
from pathlib import Path

from cluster.events import DriverEvent, WorkerReplaced
from cluster.holdings import Holdings
from cluster.metrics import FleetMetrics
from cluster.pool import WorkerPool
from cluster.replies import CallFailed, PoolEvent, ProgressSeen, PublishFinished, UnitFinished, WorkerLost
from cluster.settlement import Settlement
from jobs.errors import FailureClass
from jobs.states import JobState
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

    def handle(self, event: PoolEvent) -> None:
        """Act on one event.

        Raises:
            TransientIOError, NoCapacityError: the store cannot take it now; handle the event again.
        """
        match event:
            case ProgressSeen():
                self._follow(event.worker, event.progress)
            case UnitFinished():
                for outcome in event.outcome.jobs:
                    self._take(event.worker, outcome)
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
        """Write down how far the jobs of a unit are; each has its share of the unit's bytes."""
        num_jobs = len(progress.stages)
        for held in self._holdings.at_work(worker):
            stage = progress.stages.get(held.job_id)
            if stage is None or held.cancel_sent:
                continue
            if stage in _STATE_OF_STAGE and not self._settlement.advance(held, _STATE_OF_STAGE[stage]):
                self._pool.cancel(worker, (held.job_id,))
                continue
            self._settlement.note_progress(
                held,
                stage=stage,
                bytes_done=progress.bytes_done // num_jobs,
                bytes_total=progress.bytes_total // num_jobs,
            )

    def _take(self, worker: str, outcome: JobOutcome) -> None:
        """Act on what became of one job of a unit."""
        held = self._holdings.find(worker, outcome.job_id)
        if held is not None and held.outcome is not None:
            return  # this event is handled for the second time
        if held is not None:
            report_path = _text(outcome.report_path)
            if outcome.failure is not None:
                self._settlement.failure(held, outcome.failure, report_path)
            elif outcome.release is not None:
                self._settlement.release(held, outcome.release, report_path)
            # The fence: only the holder of the current token comes past this.
            elif self._settlement.advance(held, JobState.PUBLISHING, outcome.merge_key):
                held.outcome = outcome
                self._pool.publish(worker, held.job_id)
                return
        self._pool.discard(worker, outcome.job_id)

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
