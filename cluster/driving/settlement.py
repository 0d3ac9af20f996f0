"""Writing down what becomes of jobs: every call to the store about a job that is held goes through here."""

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from cluster.driving.events import DriverEvent, JobSettled, Summary
from cluster.driving.holdings import Held, Holdings
from cluster.driving.ports import Metrics
from jobs.errors import CancelledError, FailureClass, LeaseLostError, NoCapacityError, TransientIOError
from jobs.ledger.records import ProgressReport, Publication
from jobs.ledger.store import JobStore
from jobs.release import Release
from jobs.states import MAX_EXCUSED_LOSSES, STAGES, SUSPICIOUS_FAILURES, Decision, JobState, RetryPolicy
from workers.merging.outcomes import Failure

logger = logging.getLogger(__name__)

STORE_FAULTS = (TransientIOError, NoCapacityError)
"""The store does not answer, or its disk is full: nothing was written, and it is worth trying again."""

CANCELLED = Failure(failure_class=FailureClass.CANCELLED, message="cancelled on request")

_PATH = (JobState.LEASED, *STAGES)


class Settlement:
    """Moves held jobs on and ends their attempts. What goes wrong with one job stays with that job.

    Raises, from every method that writes: one of `STORE_FAULTS`; the same call can be made again.
    """

    def __init__(
        self,
        store: JobStore,
        holdings: Holdings,
        *,
        policy: RetryPolicy,
        metrics: Metrics,
        listener: Callable[[DriverEvent], None],
        rng: random.Random,
    ) -> None:
        """Take what it writes to and whom it tells.

        Args:
            store: the ledger.
            holdings: jobs that end are removed from it.
            policy: decides what follows a failure.
            metrics: counts attempts.
            listener: told of every attempt that ended.
            rng: source of the jitter between attempts.
        """
        self._store = store
        self._holdings = holdings
        self._policy = policy
        self._metrics = metrics
        self._listener = listener
        self._rng = rng
        self._ended: dict[str, JobSettled] = {}

    def advance(
        self, jobs: Iterable[Held], target: JobState, merge_keys: Mapping[str, str | None] | None = None
    ) -> frozenset[str]:
        """Walk jobs to `target`, through the states between that no poll has seen.

        Returns:
            Ids of those that got there. The others have ended: the lease is lost, or a user cancelled them.
        """
        wanted = list(jobs)
        # PUBLISHING is asked for again of jobs that are there: only a lease that holds now lets a release out.
        is_fence = target is JobState.PUBLISHING
        asked = [held for held in wanted if is_fence or _PATH.index(held.state) < _PATH.index(target)]
        errors: Mapping[str, Exception] = {}
        if asked:
            leases = {held.job_id: held.lease.token for held in asked}
            try:
                errors = self._store.advance(leases, target, merge_keys)
            except STORE_FAULTS:
                raise
            except Exception as error:  # noqa: BLE001 - any fault ends these jobs and no others
                errors = dict.fromkeys(leases, error)
        passed = set()
        for held in asked:
            with self._guarded(held):
                if held.job_id in errors:
                    raise errors[held.job_id]
                held.state = target
                passed.add(held.job_id)
        return frozenset(passed.union({held.job_id for held in wanted} - {held.job_id for held in asked}))

    def note_progress(self, reports: Mapping[str, tuple[Held, ProgressReport]]) -> None:
        """Write down how far the work on some jobs is."""
        for job_id in self._store.report_progress(report for _, report in reports.values()):
            self._drop(reports[job_id][0])

    def release(self, held: Held, release: Release, report_path: str | None) -> None:
        """End an attempt whose release is visible; `write_releases` writes it down, many at once."""
        self._holdings.publish(held, release, report_path)

    def write_releases(self) -> None:
        """Write down which releases are visible."""
        published = list(self._holdings.published.values())
        try:
            self._write_releases(published)
        except STORE_FAULTS:
            raise
        except Exception:
            # One of them is at fault; by itself it is the failure of its job.
            logger.exception("releases could not be stored together")
            for each in published:
                with self._guarded(each[0]):
                    self._write_releases([each])

    def _write_releases(self, published: Sequence[tuple[Held, Publication]]) -> None:
        if not published:
            return
        errors = self._store.settle([publication for _, publication in published])
        for held, publication in published:
            with self._guarded(held):
                if held.job_id in errors:
                    raise errors[held.job_id]
                event = JobSettled(
                    job_id=held.job_id,
                    state=JobState.PUBLISHED,
                    location=str(publication.release.location),
                    created=publication.release.created,
                    report_path=publication.report_path,
                    notes=publication.release.manifest.notes,
                )
                self._end(held, event)

    def failure(self, held: Held, failure: Failure, report_path: str | None = None) -> None:
        """End an attempt that failed. One that was stopped without a cancellation does not count."""
        with self._guarded(held):
            self._write_failure(held, failure, report_path)

    def unit_failure(
        self, held: Held, failure: Failure, report_path: str | None = None, *, device_failed: bool = False
    ) -> None:
        """End an attempt by what its worker says, or by the loss of it.

        What may be the doing of another job of the unit is not held against this one, nor is what a GPU did, up to
        `MAX_EXCUSED_LOSSES`: it runs alone next.
        """
        with self._guarded(held):
            if held.beside and failure.failure_class in SUSPICIOUS_FAILURES:
                self._isolate(held, failure, "its unit failed as a whole")
            elif device_failed and held.lease.excused_losses < MAX_EXCUSED_LOSSES:
                self._isolate(held, failure, "the GPU failed")
            else:
                self._write_failure(held, failure, report_path)

    def quarantine(self, held: Held) -> None:
        """End a job that was at work too often when workers and drivers were lost, before it is tried again."""
        message = (
            f"{held.lease.excused_losses} workers or drivers were lost with it at work, so it is not tried again; "
            "its events have each"
        )
        with self._guarded(held):
            decision = Decision(state=JobState.QUARANTINED)
            self._store.fail(held.job_id, held.lease.token, FailureClass.WORKER_LOST, message, decision)
            event = JobSettled(
                job_id=held.job_id, state=decision.state, failure_class=FailureClass.WORKER_LOST, message=message
            )
            self._end(held, event)

    def let_go(self, held: Held, reason: str) -> None:
        """Give a job back to the queue, as if this attempt had not been."""
        with self._guarded(held):
            self._let_go(held, reason)

    def summary(self) -> Summary:
        """Return what became of the jobs so far."""
        ended = self._ended.values()
        return Summary(
            published=sum(event.state is JobState.PUBLISHED and event.created for event in ended),
            unchanged=sum(event.state is JobState.PUBLISHED and not event.created for event in ended),
            cancelled=sum(event.state is JobState.CANCELLED for event in ended),
            failures=Counter(
                event.failure_class
                for event in ended
                if event.failure_class is not None and event.state in (JobState.FAILED, JobState.QUARANTINED)
            ),
        )

    def _write_failure(self, held: Held, failure: Failure, report_path: str | None = None) -> None:
        cancelled = held.job_id in self._store.cancelling({held.job_id: held.lease.token})
        if failure.failure_class is FailureClass.CANCELLED and not cancelled:
            self._let_go(held, "the driver stopped")
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

    def _let_go(self, held: Held, reason: str) -> None:
        self._store.let_go(held.job_id, held.lease.token, reason)
        self._end(held, JobSettled(job_id=held.job_id, state=JobState.QUEUED))

    def _isolate(self, held: Held, failure: Failure, reason: str) -> None:
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
        self._holdings.remove(held.job_id)
        self._ended[held.job_id] = event
        self._metrics.settled((event.failure_class or event.state).value.lower())
        logger.info("job settled", extra={"job_id": event.job_id, "state": event.state.value, "reason": event.message})
        self._listener(event)

    @contextlib.contextmanager
    def _guarded(self, held: Held) -> Iterator[None]:
        """Keep what goes wrong with one job from the others: a lost lease drops it, anything else ends it."""
        try:
            yield
        except STORE_FAULTS:
            raise
        except LeaseLostError:
            self._drop(held)
        except CancelledError:
            self._end_guarded(held, CANCELLED)
        except Exception as error:
            logger.exception("job could not be settled", extra={"job_id": held.job_id})
            message = f"the driver could not go on with it: {type(error).__name__}: {error}"
            self._end_guarded(held, Failure(failure_class=FailureClass.INTERNAL, message=message))

    def _end_guarded(self, held: Held, failure: Failure) -> None:
        """End a job whose settling was cut short; where that fails too, drop it."""
        try:
            self._write_failure(held, failure)
        except STORE_FAULTS:
            raise
        except LeaseLostError:
            self._drop(held)
        except Exception:
            # Its lease runs out, and the next driver to claim the job finds the release.
            logger.exception("failure could not be stored", extra={"job_id": held.job_id})
            self._drop(held)

    def _drop(self, held: Held) -> None:
        logger.warning("lease lost", extra={"job_id": held.job_id})
        self._holdings.remove(held.job_id)
