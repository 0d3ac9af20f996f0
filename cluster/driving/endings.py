"""How one attempt ends: what follows it, written down, counted, and told."""

import logging
import random
from collections.abc import Callable, Mapping

from pydantic import JsonValue

from cluster.driving.events import DriverEvent, JobSettled
from cluster.driving.holdings import Held, Holdings
from cluster.driving.places import Places
from cluster.driving.ports import Metrics
from cluster.driving.tally import Tally
from jobs.errors import FailureClass
from jobs.ledger.records import Fault, Publication
from jobs.ledger.store import JobStore
from jobs.policy import FailurePolicy
from jobs.states import FINAL_STATES, Decision, JobState
from workers.merging.outcomes import Failure

logger = logging.getLogger(__name__)


class Endings:
    """Ends attempts of jobs that are held. Raises what the store raises; nothing has changed then."""

    def __init__(
        self,
        store: JobStore,
        holdings: Holdings,
        *,
        places: Places,
        policy: FailurePolicy,
        metrics: Metrics,
        listener: Callable[[DriverEvent], None],
        rng: random.Random,
    ) -> None:
        """Take what it writes to and whom it tells.

        Args:
            store: the ledger.
            holdings: jobs that end are removed from it.
            places: tells faults of places from those of jobs.
            policy: decides what follows a failure.
            metrics: counts attempts.
            listener: told of every attempt that ended.
            rng: source of the jitter between attempts.
        """
        self.tally = Tally()
        self._store = store
        self._holdings = holdings
        self._places = places
        self._policy = policy
        self._metrics = metrics
        self._listener = listener
        self._rng = rng

    def published(self, held: Held, publication: Publication) -> None:
        """Take in that a release is in the ledger."""
        event = JobSettled(
            job_id=held.job_id,
            state=JobState.PUBLISHED,
            location=str(publication.release.location),
            created=publication.release.created,
            report_path=publication.report_path,
            notes=publication.release.manifest.notes,
        )
        self._places.got_to(held, JobState.PUBLISHED)
        self._end(held, event)

    def awaiting(self, held: Held, merge_key: str, report_path: str | None, detail: Mapping[str, JsonValue]) -> bool:
        """End an attempt whose release is proven; return whether it waits for a person now, and is not cancelled."""
        state = self._store.await_approval(held.job_id, held.lease.token, merge_key, report_path, detail)
        self._end(held, JobSettled(job_id=held.job_id, state=state, report_path=report_path))
        return state is JobState.AWAITING_APPROVAL

    def quarantine(self, held: Held) -> None:
        """End a job that was at work each time that a driver was lost."""
        message = (
            f"{held.lease.driver_losses} drivers in a row were lost, each with it at work, so it is not tried again; "
            "its events have each"
        )
        decision = Decision(state=JobState.QUARANTINED)
        self._store.fail(held.job_id, held.lease.token, FailureClass.WORKER_LOST, message, decision)
        event = JobSettled(
            job_id=held.job_id, state=decision.state, failure_class=FailureClass.WORKER_LOST, message=message
        )
        self._end(held, event)

    def failed(self, held: Held, failure: Failure, report_path: str | None = None) -> None:
        """End an attempt that failed: by the policy of its class, or as a fault of a place."""
        cancelled = held.job_id in self._store.cancelling({held.job_id: held.lease.token})
        if failure.failure_class is FailureClass.CANCELLED and not cancelled:
            self.let_go(held, "the driver stopped")
            return
        if not cancelled and (fault := self._places.fault_of(held, failure)) is not None:
            self._excuse(held, fault)
            return
        worker_lost = failure.failure_class is FailureClass.WORKER_LOST
        decision = self._policy.decide(
            failure.failure_class,
            attempts=held.lease.attempts,
            worker_losses=held.lease.worker_losses + worker_lost,
            rng=self._rng,
        )
        if cancelled:
            decision = Decision(state=JobState.CANCELLED)
        message = failure.message
        if decision.state is JobState.QUARANTINED:
            message += (
                f"; {held.lease.worker_losses + 1} workers were lost while it ran alone, so it is not tried again; its "
                "events have the reason of each"
            )
        self._store.fail(
            held.job_id,
            held.lease.token,
            failure.failure_class,
            message,
            decision,
            report_path=report_path,
            worker_lost=worker_lost,
        )
        self._end(
            held,
            JobSettled(
                job_id=held.job_id,
                state=decision.state,
                failure_class=failure.failure_class,
                message=message,
                retry_seconds=decision.delay_seconds if decision.state is JobState.RETRY_WAIT else None,
                report_path=report_path,
            ),
        )

    def _excuse(self, held: Held, fault: Fault) -> None:
        """Give a job back whose attempt a place has ended; the place rests, and the job is not charged."""
        reason = "it waits for room: not charged" if fault.place is None else f"{fault.place} is at fault: not charged"
        # First the place: a job that is given back before would be claimed again at once.
        if fault.place is not None:
            self._places.pause(held, fault)
        self._store.let_go(held.job_id, held.lease.token, reason, fault)
        self._metrics.excused(fault.failure.value)
        state = JobState.QUEUED if fault.delay_seconds is None else JobState.RETRY_WAIT
        self._end(
            held,
            JobSettled(
                job_id=held.job_id,
                state=state,
                failure_class=fault.failure,
                message=fault.message,
                place=fault.place,
                retry_seconds=fault.delay_seconds,
            ),
        )

    def let_go(self, held: Held, reason: str) -> None:
        """Give a job back to the queue, as if this attempt had not been."""
        self._store.let_go(held.job_id, held.lease.token, reason)
        self._end(held, JobSettled(job_id=held.job_id, state=JobState.QUEUED))

    def isolate(self, held: Held, failure: Failure, reason: str) -> None:
        """Give a job back that likely others are to blame for; it runs alone next."""
        cancelled = held.job_id in self._store.cancelling({held.job_id: held.lease.token})
        self._store.isolate(held.job_id, held.lease.token, failure.failure_class, failure.message, reason)
        self._end(
            held,
            JobSettled(
                job_id=held.job_id,
                state=JobState.CANCELLED if cancelled else JobState.QUEUED,
                failure_class=failure.failure_class,
                message=failure.message,
            ),
        )

    def _end(self, held: Held, event: JobSettled) -> None:
        if event.place is None and event.state is not JobState.PUBLISHED:
            self._places.ended(held)
        self._holdings.remove(held.job_id)
        self.tally.count(event)
        if event.state in FINAL_STATES:
            self._holdings.shunned.pop(held.job_id, None)
            self._places.forget(held)
        self._metrics.settled((event.failure_class or event.state).value.lower())
        said = {"job_id": event.job_id, "state": event.state.value}
        if event.failure_class is not None:
            said |= {"failure": event.failure_class.value, "reason": event.message or ""}
        logger.info("job settled", extra=said)
        self._listener(event)
