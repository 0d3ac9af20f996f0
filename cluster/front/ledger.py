"""A queue whose ledger is opened here."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.front.reports import read_report
from cluster.settings import Settings
from jobs.batch import batch_name
from jobs.collecting import uncollected
from jobs.errors import BadInputError, NotFoundError
from jobs.ledger.causes import FailureGroup, group_failures
from jobs.ledger.pauses import Pause, Scope, check_scope
from jobs.ledger.queries import Order
from jobs.ledger.records import BatchRecord, DriverRecord, Event, JobPage, JobRecord, SubmitResult, Work
from jobs.ledger.selection import ALL, Selection
from jobs.ledger.store import JobStore
from jobs.locations import Elsewhere, parse_location
from jobs.parity_report import ParityReport
from jobs.places import parse_place
from jobs.policy import FailurePolicy
from jobs.release import Release
from jobs.request import MergeRequest
from jobs.request_files.patterns import Listing
from jobs.request_files.reading import Origin, document_of, read_requests, read_text
from jobs.states import JobState


class LedgerService:
    """A queue over its ledger, which is opened when it is first asked something, and made by what adds to it alone.

    Args:
        settings: where the ledger and the reports are, which places requests may name, what follows failures.
        look: makes what patterns of request files are looked up in. Without it they are refused, as they have to be
            where others' files are read: what lies on this machine is not for them to find out.
    """

    def __init__(self, settings: Settings, look: Callable[[], Listing] | None = None) -> None:
        self._settings = settings
        self._look = look
        self._store: JobStore | None = None

    def open(self, *, create: bool = False) -> JobStore:
        """Return the ledger.

        Args:
            create: whether one that is missing is made.

        Raises:
            BadInputError, NotFoundError: it cannot be opened, or there is none.
        """
        if self._store is None:
            self._store = JobStore(self._settings.store, create=create)
        return self._store

    def close(self) -> None:
        """Let go of connections."""
        if self._store is not None:
            self._store.close()

    def submit(self, requests: Sequence[MergeRequest], batch: str) -> SubmitResult:
        """Make jobs of requests; see `Intake`."""
        return self.submit_text(document_of(requests), Origin("requests", ".json", Elsewhere(None)), batch)

    def submit_file(self, path: Path, batch: str) -> SubmitResult:
        """Make jobs of the requests of a file; see `Intake`."""
        return self.submit_text(read_text(path), Origin.of(path), batch)

    def submit_text(self, text: str, origin: Origin, batch: str) -> SubmitResult:
        """Make jobs of the text of a request file; raises as `submit_file` does.

        Args:
            text: of the file.
            origin: where it comes from.
            batch: that the jobs join.
        """
        name = batch_name(batch, given=True)
        with uncollected():
            listing = None if self._look is None else self._look()
            reading = read_requests(text, origin, self._settings.allowance, listing)
            result = self.open(create=True).submit(reading.requests, name)
            return replace(result, left_out=reading.left_out)

    def cancel(self, selection: Selection) -> tuple[str, ...]:
        """Cancel jobs; see `Steering`."""
        return self.open().cancel(self._chosen(selection))

    def retry(self, selection: Selection) -> tuple[str, ...]:
        """Queue jobs again; see `Steering`."""
        return self.open().retry(self._chosen(selection))

    def approve(self, selection: Selection, by: str) -> tuple[str, ...]:
        """Let jobs be published that wait for it; see `Steering`."""
        return self.open().approve(self._chosen(selection), by)

    def reject(self, selection: Selection, by: str, reason: str) -> tuple[str, ...]:
        """Cancel jobs that wait for approval; see `Steering`."""
        return self.open().reject(self._chosen(selection), by, reason)

    def pause(self, scope: Scope, name: str, by: str, reason: str) -> bool:
        """Keep jobs from being started; see `Steering`."""
        return self.open().pause(scope, _known_name(scope, name), by, reason)

    def resume(self, scope: Scope, name: str) -> tuple[Pause, ...]:
        """End the pauses of one thing; see `Steering`."""
        return self.open().resume(scope, _known_name(scope, name))

    def release_leases(self, driver: str) -> int:
        """Let the leases of a driver run out now; see `Steering`."""
        return self.open().release_leases(driver)

    def jobs(
        self, selection: Selection = ALL, *, order: Order = "submitted", limit: int | None = None
    ) -> tuple[JobRecord, ...]:
        """Return jobs; see `Jobs`."""
        return self.open().jobs(selection, order=order, limit=limit)

    def page(
        self, selection: Selection = ALL, *, order: Order = "submitted", limit: int = 100, cursor: str | None = None
    ) -> JobPage:
        """Return some jobs; see `Jobs`."""
        return self.open().page(selection, order=order, limit=limit, cursor=cursor)

    def job(self, job_id: str) -> JobRecord:
        """Return a job; see `Jobs`."""
        found = self.open().jobs(Selection(ids=[job_id]))
        if not found:
            raise NotFoundError(f"no such job: {job_id}")
        return found[0]

    def events(self, job_id: str, after: int = 0) -> tuple[Event, ...]:
        """Return what happened to a job; see `Jobs`."""
        found = self.open().events(job_id, after)
        if not found and not self.open().ids(Selection(ids=[job_id])):
            raise NotFoundError(f"no such job: {job_id}")
        return found

    def release(self, job_id: str) -> Release:
        """Return the release of a job; see `Jobs`."""
        record = self.job(job_id)
        if record.release is None:
            raise NotFoundError(f"job '{job_id}' has no release: it is {record.state}")
        return record.release

    def report(self, job_id: str) -> ParityReport:
        """Return the parity report of a job; see `Jobs`."""
        return ParityReport.model_validate_json(self.report_file(job_id))

    def report_file(self, job_id: str, *, page: bool = False) -> bytes:
        """Return the parity report of a job as the worker wrote it: JSON, or the page for people."""
        return read_report(self.job(job_id), self._settings.reports, page=page)

    def now(self) -> float:
        """Return the time on the queue's clock."""
        return self.open().now()

    def batches(self) -> tuple[BatchRecord, ...]:
        """Return all batches; see `Overview`."""
        return self.open().batches()

    def batch(self, name: str) -> BatchRecord:
        """Return one batch; see `Overview`."""
        return self.open().batch(name)

    def counts(self, selection: Selection = ALL) -> dict[JobState, int]:
        """Return the number of jobs in each state; see `Overview`."""
        return self.open().counts(selection)

    def num_held(self, selection: Selection = ALL) -> dict[str, int]:
        """Return how many jobs each pause holds; see `Overview`."""
        return self.open().num_held(selection)

    def work(self, selection: Selection = ALL) -> tuple[Work, ...]:
        """Return how far the work on each base is; see `Overview`."""
        return self.open().work(selection)

    def failures(self, selection: Selection = ALL) -> tuple[FailureGroup, ...]:
        """Return failures by cause; see `Overview`."""
        return group_failures(self.open().failures(selection))

    def pauses(self) -> tuple[Pause, ...]:
        """Return what is paused; see `Overview`."""
        return self.open().pauses()

    def drivers(self) -> tuple[DriverRecord, ...]:
        """Return the drivers; see `Overview`."""
        return self.open().drivers()

    def policy(self) -> FailurePolicy:
        """Return what follows each class of failure; see `Overview`."""
        return self._settings.failure_policy

    def _chosen(self, selection: Selection) -> tuple[str, ...]:
        """Return the ids of the jobs that are to be changed."""
        store = self.open()
        narrows: Iterable[Collection[Any] | float | None] = (
            selection.ids,
            selection.batch,
            selection.states,
            selection.labels or None,
            selection.failures,
            selection.since,
            selection.unfinished_at,
        )
        if all(each is None for each in narrows):
            raise BadInputError("name the jobs: by id, batch, state, label or class of failure")
        if selection.batch is not None:
            store.batch(selection.batch)
        found = store.ids(selection)
        if selection.ids is not None and (unknown := set(selection.ids) - set(store.ids(Selection(ids=selection.ids)))):
            raise NotFoundError(f"no such job: {', '.join(sorted(unknown))}")
        return found


def _known_name(scope: Scope, name: str) -> str:
    """Return the name that the ledger has for what is to be paused."""
    check_scope(scope, name)
    if scope is Scope.BASE:
        return str(parse_location(name))
    return parse_place(name) if scope is Scope.PLACE else name
