"""Writing down what becomes of jobs: every call to the store about a job that is held goes through here."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import JsonValue

from cluster.driving.endings import Endings
from cluster.driving.holdings import Held, Holdings
from cluster.driving.places import Places
from cluster.driving.scheduler import WorkerView
from jobs.errors import CancelledError, FailureClass, LeaseLostError, NoCapacityError, TransientIOError
from jobs.ledger.records import Beginning, ProgressReport, Publication
from jobs.ledger.store import JobStore
from jobs.release import Release
from jobs.states import MAX_EXCUSED_LOSSES, STAGES, SUSPICIOUS_FAILURES, JobState
from workers.merging.outcomes import Failure, JobOutcome

logger = logging.getLogger(__name__)

STORE_FAULTS = (TransientIOError, NoCapacityError)
"""The store does not answer, or its disk is full: nothing was written, and it is worth trying again."""

CANCELLED = Failure(failure_class=FailureClass.CANCELLED, message="cancelled on request")

_PATH = (JobState.LEASED, *STAGES)


class Settlement:
    """Moves held jobs on and ends their attempts. What goes wrong with one job stays with that job.

    Raises, from every method that writes: one of `STORE_FAULTS`; the same call can be made again.
    """

    def __init__(self, store: JobStore, holdings: Holdings, places: Places, endings: Endings) -> None:
        """Take what it writes to.

        Args:
            store: the ledger.
            holdings: jobs that end are removed from it.
            places: told how far jobs get.
            endings: ends attempts.
        """
        self._store = store
        self._holdings = holdings
        self._places = places
        self._endings = endings

    def begin(self, jobs: Mapping[str, WorkerView], now: float) -> frozenset[str]:
        """Start the attempts of jobs that wait: they count from now on.

        Args:
            jobs: by id, the worker that each is for.
            now: on the driver's clock.

        Returns:
            Ids of those that may be worked on. The others have ended: the lease is lost, or a user cancelled them.
        """
        held = {job_id: self._holdings.waiting[job_id] for job_id in jobs}
        errors = self._store.begin(
            Beginning(
                job_id=job_id,
                token=each.lease.token,
                worker=jobs[job_id].name,
                node=jobs[job_id].host,
                log=jobs[job_id].log,
            )
            for job_id, each in held.items()
        )
        begun = set()
        for job_id, each in held.items():
            with self._guarded(each):
                if job_id in errors:
                    raise errors[job_id]
                each.state, each.began_at, each.host = JobState.PLANNING, now, jobs[job_id].host
                begun.add(job_id)
        return frozenset(begun)

    def advance(
        self,
        jobs: Iterable[Held],
        target: JobState,
        merge_keys: Mapping[str, str | None] | None = None,
        detail: Mapping[str, JsonValue] | None = None,
    ) -> frozenset[str]:
        """Walk jobs to `target`, through the states between that no poll has seen; arguments as the store has them.

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
                errors = self._store.advance(leases, target, merge_keys, detail)
            except STORE_FAULTS:
                raise
            except Exception as error:  # noqa: BLE001 - any fault ends these jobs and no others
                errors = dict.fromkeys(leases, error)
        passed = set()
        for held in asked:
            with self._guarded(held):
                if held.job_id in errors:
                    raise errors[held.job_id]
                if _PATH.index(held.state) < _PATH.index(target):
                    held.state = target
                    self._places.got_to(held, target)
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
                self._endings.published(held, publication)

    def failure(self, held: Held, failure: Failure, report_path: str | None = None) -> None:
        """End an attempt that failed. One that was stopped without a cancellation does not count."""
        with self._guarded(held):
            self._endings.failed(held, failure, report_path)

    def unit_failure(
        self, held: Held, failure: Failure, report_path: str | None = None, *, device_failed: bool = False
    ) -> None:
        """End an attempt by what its worker says, or by the loss of it.

        What may be the doing of another job of the unit is not held against this one, nor is what a GPU did, up to
        `MAX_EXCUSED_LOSSES`: it runs alone next.
        """
        with self._guarded(held):
            if held.beside and failure.failure_class in SUSPICIOUS_FAILURES and not failure.waits:
                self._endings.isolate(held, failure, "its unit failed as a whole")
            elif device_failed and held.lease.excused_losses < MAX_EXCUSED_LOSSES:
                self._endings.isolate(held, failure, "the GPU failed")
            else:
                self._endings.failed(held, failure, report_path)

    def await_approval(self, held: Held, outcome: JobOutcome, detail: Mapping[str, JsonValue]) -> bool:
        """End an attempt whose release is proven, and waits for a person's word.

        Returns:
            Whether the job waits now. Otherwise it has ended: the lease is lost, or a user cancelled it.
        """
        assert outcome.merge_key is not None
        report_path = None if outcome.report_path is None else str(outcome.report_path)
        if self.advance([held], JobState.VERIFYING):
            with self._guarded(held):
                return self._endings.awaiting(held, outcome.merge_key, report_path, detail)
        return False

    def quarantine(self, held: Held) -> None:
        """End a job that was at work each time that a driver was lost, before it is tried again."""
        with self._guarded(held):
            self._endings.quarantine(held)

    def let_go(self, held: Held, reason: str) -> None:
        """Give a job back to the queue, as if this attempt had not been."""
        with self._guarded(held):
            self._endings.let_go(held, reason)

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
            self._endings.failed(held, failure)
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
