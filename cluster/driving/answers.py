"""What the driver does with what workers say: move jobs on, have them published, end their attempts."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pydantic import JsonValue

from cluster.driving.events import DriverEvent, WorkerBenched, WorkerReplaced
from cluster.driving.holdings import Held, Holdings
from cluster.driving.ports import Metrics, Pool
from cluster.driving.progress import ProgressNotes
from cluster.driving.replies import (
    CallFailed,
    PassBegun,
    PoolEvent,
    ProgressSeen,
    PublishFinished,
    ShardsMerged,
    TurnedDown,
    UnitFinished,
    WorkerLost,
    WorkerUnfit,
)
from cluster.driving.settlement import Settlement
from jobs.errors import FailureClass
from jobs.states import JobState
from workers.merging.outcomes import Failure, JobOutcome, PublishOutcome

logger = logging.getLogger(__name__)


class AnswerHandler:
    """Handles the events of a pool. An event that a store fault cut short can be handled again."""

    def __init__(
        self,
        holdings: Holdings,
        pool: Pool,
        settlement: Settlement,
        *,
        progress: ProgressNotes,
        metrics: Metrics,
        listener: Callable[[DriverEvent], None],
    ) -> None:
        """Take what it reads and calls.

        Args:
            holdings: which job is on which worker.
            pool: told to publish, discard and cancel.
            settlement: writes to the store.
            progress: notes what workers tell while they work.
            metrics: counts units, bytes, seconds and deaths.
            listener: told of lost workers.
        """
        self._holdings = holdings
        self._pool = pool
        self._settlement = settlement
        self._metrics = metrics
        self._listener = listener
        self._progress = progress

    def handle(self, event: PoolEvent) -> None:
        """Act on one event.

        Raises:
            TransientIOError, NoCapacityError: the store cannot take it now; handle the event again.
        """
        match event:
            case ProgressSeen():
                self._progress.note(event.worker, event.progress)
            case UnitFinished():
                self._take_all(event.worker, event.outcome.jobs, self._used_for(event))
                self._fail_unanswered(event.worker)
                self._holdings.let_go(event.worker, [job.job_id for job in event.outcome.jobs])
                self._metrics.unit_finished(event.outcome)
                self._metrics.used(event.outcome.usage)
            case PassBegun():
                self._take_begun(event)
                self._metrics.used(event.outcome.usage)
            case ShardsMerged():
                self._take_merged(event)
                self._metrics.used(event.outcome.usage)
            case TurnedDown():
                self._take_refusal(event)
            case PublishFinished():
                self._take_published(event.worker, event.outcome)
                self._metrics.publish_finished(event.outcome)
            case CallFailed():
                self._take_fault(event)
            case WorkerLost():
                self._take_loss(event)
                self._metrics.worker_lost()
            case WorkerUnfit():
                # It had no jobs by now: what it had before went with the loss that came first.
                self._listener(WorkerBenched(worker=event.worker, reason=event.reason))
                self._metrics.worker_benched()

    def _used_for(self, event: UnitFinished) -> dict[str, JsonValue]:
        """Return what a unit took, on all workers that shared it, for the events of its jobs."""
        flight = self._holdings.flights.get(event.worker)
        shared = flight.shared if flight else None
        usage = event.outcome.usage if shared is None else shared.usage.plus(event.outcome.usage)
        return {
            "jobs": len(event.outcome.jobs),
            "bytes_read": usage.bytes_read,
            "bytes_written": usage.bytes_written,
            "bytes_uploaded": usage.bytes_uploaded,
            "seconds": {stage: round(seconds, 3) for stage, seconds in usage.seconds.items()},
        }

    def _take_all(self, worker: str, outcomes: Sequence[JobOutcome], usage: JsonValue) -> None:
        """Act on what became of the jobs of a unit."""
        staged: dict[str, tuple[Held, JobOutcome]] = {}
        helpers = self._holdings.helpers(worker)
        for outcome in outcomes:
            held = self._holdings.find(worker, outcome.job_id)
            if held is not None and held.outcome is not None:
                continue  # this event is handled for the second time
            if held is not None and _needs_approval(held, outcome):
                waits = self._settlement.await_approval(held, outcome, {"unit": usage})
                for each in (worker, *helpers):  # a helper has finished shards, too
                    (self._pool.leave if waits else self._pool.discard)(each, outcome.job_id)
                continue
            if held is not None and outcome.is_staged:
                staged[outcome.job_id] = held, outcome
                continue
            if held is not None:
                self._settle(held, outcome)
            self._pool.discard(worker, outcome.job_id)
        # The fence: only the holders of the current tokens come past this.
        merge_keys = {job_id: outcome.merge_key for job_id, (_, outcome) in staged.items()}
        passed = self._settlement.advance(
            (held for held, _ in staged.values()), JobState.PUBLISHING, merge_keys, {"unit": usage}
        )
        for job_id, (held, outcome) in staged.items():
            if job_id in passed:
                held.outcome = outcome
                approval = held.lease.approval
                self._pool.publish(worker, job_id, None if approval is None else approval.by)
            else:
                self._pool.discard(worker, job_id)

    def _settle(self, held: Held, outcome: JobOutcome) -> None:
        """End a job that failed, or whose release was there already."""
        report_path = _text(outcome.report_path)
        if outcome.failure is not None and self._is_for_larger(held, outcome.failure):
            self._settlement.let_go(held, f"too large for {held.host}, not charged: {outcome.failure.message}")
        elif outcome.failure is not None:
            self._settlement.unit_failure(held, outcome.failure, report_path)
        elif outcome.release is not None:
            self._settlement.release(held, outcome.release, report_path)

    def _is_for_larger(self, held: Held, failure: Failure) -> bool:
        """Whether a job that is too large for one machine has others to go to, which it then does."""
        if failure.failure_class is not FailureClass.TOO_LARGE:
            return False
        views = [view for view in self._pool.views() if view.up]
        tried = self._holdings.shunned.get(held.job_id, frozenset())
        tried |= {view.name for view in views if view.host == held.host}
        self._holdings.shunned[held.job_id] = tried
        return any(view.name not in tried for view in views)

    def _take_published(self, worker: str, outcome: PublishOutcome) -> None:
        held = self._holdings.find(worker, outcome.job_id)
        if held is not None and held.outcome is not None:
            report_path = _text(held.outcome.report_path)
            if outcome.release is not None:
                self._settlement.release(held, outcome.release, report_path)
            elif outcome.failure is not None:
                self._settlement.failure(held, outcome.failure, report_path)
        self._holdings.let_go(worker, [outcome.job_id])  # the worker keeps nothing of it, published or failed

    def _fail_unanswered(self, worker: str) -> None:
        """Fail the jobs of a finished unit that its outcome does not name, rather than wait for them forever."""
        for held in self._holdings.at_work(worker):
            self._settlement.failure(held, _fault(f"{worker} returned no outcome for it"))

    def _take_begun(self, event: PassBegun) -> None:
        """Settle the jobs that end before anything is merged; the pieces of the others can be handed out."""
        flight = self._holdings.flights.get(event.worker)
        shared = flight.shared if flight else None
        if flight is None or shared is None or shared.pass_id != event.pass_id:
            self._discard(event.worker, (*event.outcome.tickets, *(job.job_id for job in event.outcome.ended)))
            return
        if not shared.is_open:
            shared.open(event.outcome)
        self._end(event.worker, event.outcome.ended)
        self._discard(event.worker, event.outcome.tickets.keys() - flight.held.keys())
        self._holdings.let_go(event.worker, [job.job_id for job in event.outcome.ended])
        unanswered = [held for job_id, held in flight.held.items() if job_id not in event.outcome.tickets]
        for held in unanswered:
            self._settlement.failure(held, _fault(f"{event.worker} returned no outcome for it"))

    def _take_merged(self, event: ShardsMerged) -> None:
        found = self._holdings.shared(event.pass_id)
        ended = [job.job_id for job in event.outcome.ended]
        if found is None:
            self._discard(event.worker, event.outcome.merged)
        else:
            leader, _, shared = found
            shared.take(event.worker, event.outcome)
            self._end(leader, event.outcome.ended)
        self._holdings.let_go(event.worker, ended)

    def _take_refusal(self, event: TurnedDown) -> None:
        """Do without a worker that cannot take part; one that leads hands on to one that can."""
        logger.warning("worker takes no part", extra={"worker": event.worker, "reason": event.reason})
        found = self._holdings.shared(event.pass_id)
        if found is None:
            return
        leader, flight, shared = found
        shared.barred.add(event.worker)
        shared.take_back(event.worker)
        if leader != event.worker:
            return
        shared.finishing = False
        if not self._holdings.hand_on(leader):
            failure = Failure(
                failure_class=FailureClass.WORKER_LOST,
                message=f"no worker is left that can go on with what others have merged: {event.reason}",
            )
            for held in list(flight.held.values()):
                self._settlement.failure(held, failure)

    def _end(self, leader: str, outcomes: Iterable[JobOutcome]) -> None:
        """Settle jobs of a shared pass that have ended."""
        for outcome in outcomes:
            held = self._holdings.find(leader, outcome.job_id)
            if held is not None:
                self._settle(held, outcome)

    def _discard(self, worker: str, job_ids: Iterable[str]) -> None:
        ids = list(job_ids)
        for job_id in ids:
            self._pool.discard(worker, job_id)
        self._holdings.let_go(worker, ids)

    def _take_fault(self, event: CallFailed) -> None:
        """Turn an exception that came out of a worker into the failure of the jobs it was about."""
        said = {"worker": event.worker, "call": event.call, "reason": event.message}
        logger.error("call failed", extra=said if event.job_id is None else said | {"job_id": event.job_id})
        if event.call not in ("run_unit", "open_pass", "merge_shards", "finish_pass", "publish"):
            return
        leader: str | None = event.worker
        if event.pass_id is not None:
            found = self._holdings.shared(event.pass_id)
            leader = found[0] if found else None
        for held in self._holdings.on_worker(leader) if leader else ():
            if event.job_id in (None, held.job_id):
                self._settlement.unit_failure(held, _fault(f"{event.call} on {event.worker} raised: {event.message}"))
                self._pool.discard(event.worker, held.job_id)

    def _take_loss(self, event: WorkerLost) -> None:
        self._holdings.dropped.pop(event.worker, None)
        lost: list[Held] = []
        for leader, flight, shared in list(self._holdings.shared_passes()):
            if event.worker == leader or event.worker in shared.at_work:
                staged = any(held.outcome is not None for held in flight.held.values())
                if not shared.is_open or staged:
                    lost += self._holdings.on_worker(leader)
                elif shared.lose(event.worker):
                    for held in flight.held.values():
                        # A machine takes all its workers along: only what had one by itself is blamed.
                        held.beside |= not shared.is_blamed
                        lost.append(held)
                elif event.worker == leader:
                    # Another takes its place under its name, and can go on with what there is.
                    shared.finishing = False
        leads = self._holdings.flights.get(event.worker)
        if leads is not None and leads.shared is None:
            lost += self._holdings.on_worker(event.worker)
        ids = tuple(held.job_id for held in lost)
        said = {"worker": event.worker, "reason": event.reason, "job_ids": list(ids)}
        logger.warning("worker lost with its jobs", extra=said)
        self._listener(WorkerReplaced(worker=event.worker, reason=event.reason, job_ids=ids))
        failure = Failure(
            failure_class=FailureClass.OUT_OF_MEMORY if event.out_of_memory else FailureClass.WORKER_LOST,
            message=f"{event.worker} was lost with {len(lost)} job{'' if len(lost) == 1 else 's'}: {event.reason}",
        )
        for held in lost:
            self._settlement.unit_failure(held, failure, device_failed=event.device_failed)
            if event.device_failed:
                self._holdings.shunned[held.job_id] = frozenset({event.worker})


def _needs_approval(held: Held, outcome: JobOutcome) -> bool:
    """Whether a staged release is not the one that a person has approved, where its request asks for that."""
    approval = held.lease.approval
    is_approved = approval is not None and approval.merge_key == outcome.merge_key
    return held.lease.request.requires_approval and outcome.is_staged and not is_approved


def _fault(message: str) -> Failure:
    return Failure(failure_class=FailureClass.INTERNAL, message=f"{message}; this is a fault of mergefleet")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
