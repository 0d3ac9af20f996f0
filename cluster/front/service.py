"""What people and programs ask of a queue, whether its ledger is here or behind a server.

Both implementations pass `tests/contract/test_services.py`: same values, same errors, of the classes in
`jobs/errors.py`. Over HTTP a server that does not answer is a TransientIOError, and one that refuses the token an
AuthError.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jobs.ledger.causes import FailureGroup
from jobs.ledger.pauses import Pause, Scope
from jobs.ledger.queries import Order
from jobs.ledger.records import BatchRecord, DriverRecord, Event, JobPage, JobRecord, SubmitResult, Work
from jobs.ledger.selection import ALL, Selection
from jobs.parity_report import ParityReport
from jobs.policy import FailurePolicy
from jobs.release import Release
from jobs.request import MergeRequest
from jobs.states import JobState


class Intake(Protocol):
    """How requests become jobs: all of them, or none."""

    def submit(self, requests: Sequence[MergeRequest], batch: str) -> SubmitResult:
        """Make jobs of requests; those that are jobs already change nothing.

        Raises:
            RequestFileError: a place is not allowed, or an id or destination is there twice; lists all of them.
            BadInputError: an id has other content, or a destination belongs to another job; lists all such conflicts.
        """
        ...

    def submit_file(self, path: Path, batch: str) -> SubmitResult:
        """Make jobs of the requests of a file; paths in it, and what patterns stand for, are those of this machine.

        Raises:
            RequestFileError: anything is wrong with the file; lists every mistake with its line.
            BadInputError: as for `submit`.
            TransientIOError: a pattern could not be looked up, as a store did not answer.
        """
        ...


class Steering(Protocol):
    """What changes the course of jobs."""

    def cancel(self, selection: Selection) -> tuple[str, ...]:
        """Cancel jobs; returns the ids of those that this changed.

        Raises:
            BadInputError: the selection narrows nothing; all jobs are never meant by saying nothing.
            NotFoundError: it names ids that are no jobs, or a batch that is none.
        """
        ...

    def retry(self, selection: Selection) -> tuple[str, ...]:
        """Queue jobs again, with attempts that start anew; returns and raises as `cancel` does."""
        ...

    def approve(self, selection: Selection, by: str) -> tuple[str, ...]:
        """Let jobs that wait for approval be published, in a person's name; returns and raises as `cancel` does.

        Raises:
            BadInputError: no one is named, too.
        """
        ...

    def reject(self, selection: Selection, by: str, reason: str) -> tuple[str, ...]:
        """Cancel jobs that wait for approval, in a person's name; returns and raises as `approve` does."""
        ...

    def pause(self, scope: Scope, name: str, by: str, reason: str) -> bool:
        """Keep jobs from being started; returns whether no person did before.

        Raises:
            BadInputError: it names nothing that can be paused.
            NotFoundError: there is no such batch, or no job of such a base.
        """
        ...

    def resume(self, scope: Scope, name: str) -> tuple[Pause, ...]:
        """End the pauses of one thing; returns those that were.

        Raises:
            BadInputError: it names nothing that can be paused.
        """
        ...

    def release_leases(self, driver: str) -> int:
        """Let the leases of a driver run out now; returns how many there were.

        Raises:
            NotFoundError: there is no such driver.
        """
        ...


class Jobs(Protocol):
    """What there is to know of single jobs."""

    def jobs(
        self, selection: Selection = ALL, *, order: Order = "submitted", limit: int | None = None
    ) -> tuple[JobRecord, ...]:
        """Return jobs, at most so many; unknown ids are left out."""
        ...

    def page(
        self, selection: Selection = ALL, *, order: Order = "submitted", limit: int = 100, cursor: str | None = None
    ) -> JobPage:
        """Return some jobs, and how to ask for the next.

        Raises:
            InvalidValueError: the cursor is none of this order.
        """
        ...

    def job(self, job_id: str) -> JobRecord:
        """Return a job.

        Raises:
            NotFoundError: there is none of this id.
        """
        ...

    def events(self, job_id: str, after: int = 0) -> tuple[Event, ...]:
        """Return what happened to a job, oldest first, from the event after this number on.

        Raises:
            NotFoundError: there is no such job.
        """
        ...

    def release(self, job_id: str) -> Release:
        """Return the release of a job.

        Raises:
            NotFoundError: there is no such job, or it is not published.
        """
        ...

    def report(self, job_id: str) -> ParityReport:
        """Return the parity report of the last attempt of a job that came that far.

        Raises:
            NotFoundError: there is no such job, it has no report, or the report is not on the machine of the queue.
        """
        ...


class Overview(Protocol):
    """What there is to know of many jobs at once, and of who works on them."""

    def now(self) -> float:
        """Return the time on the queue's clock, seconds since 1970."""
        ...

    def batches(self) -> tuple[BatchRecord, ...]:
        """Return all batches, oldest first."""
        ...

    def batch(self, name: str) -> BatchRecord:
        """Return one batch.

        Raises:
            NotFoundError: there is none of this name.
        """
        ...

    def counts(self, selection: Selection = ALL) -> dict[JobState, int]:
        """Return the number of jobs in each state, zeros included; of the selection all but ids count."""
        ...

    def num_held(self, selection: Selection = ALL) -> dict[str, int]:
        """Return how many jobs that wait are held, by the pause that holds them."""
        ...

    def work(self, selection: Selection = ALL) -> tuple[Work, ...]:
        """Return how far the work on each base is; of the selection all but ids count."""
        ...

    def failures(self, selection: Selection = ALL) -> tuple[FailureGroup, ...]:
        """Return failures by cause, the most frequent first; of the selection all but ids count."""
        ...

    def pauses(self) -> tuple[Pause, ...]:
        """Return what is paused, oldest first."""
        ...

    def drivers(self) -> tuple[DriverRecord, ...]:
        """Return the drivers that work, or hold leases."""
        ...

    def policy(self) -> FailurePolicy:
        """Return what follows each class of failure, as the settings of the queue have it."""
        ...


class Service(Intake, Steering, Jobs, Overview, Protocol):
    """A queue."""

    def close(self) -> None:
        """Let go of connections."""
        ...
