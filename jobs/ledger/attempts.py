"""How attempts end in the ledger: published, failed, given back."""

from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue
from sqlalchemy import insert

from jobs.errors import FailureClass, InternalError, MergefleetError
from jobs.ledger.database import Database
from jobs.ledger.journal import Move, Step, make_moves, take_steps
from jobs.ledger.leases import NO_LEASE, lock_held, lock_jobs, lost_lease
from jobs.ledger.records import Fault, Publication
from jobs.ledger.rows import JobRow
from jobs.ledger.schema import releases
from jobs.states import SUSPICIOUS_FAILURES, Decision, JobState

_FAILURE_STATES = frozenset({JobState.RETRY_WAIT, JobState.FAILED, JobState.QUARANTINED, JobState.CANCELLED})


class Attempts:
    """The side of the ledger that the holder of a lease writes when its work has ended."""

    _database: Database

    def settle(self, publications: Sequence[Publication]) -> dict[str, MergefleetError]:
        """Record releases: their jobs are PUBLISHED from then on, also those that a user asked to cancel.

        Args:
            publications: at most one for each job.

        Returns:
            Why releases were not recorded, by job: LeaseLostError when the token is stale or the lease has expired;
            the next driver to claim the job finds the release.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
        """
        by_id = {each.job_id: each for each in publications}
        errors: dict[str, MergefleetError] = {}
        moves, rows = [], []
        with self._database.write() as connection:
            found, now = lock_jobs(self._database, connection, by_id)
            for row in found:
                each = by_id[row.id]
                if lost := lost_lease(row, each.token, now):
                    errors[row.id] = lost
                    continue
                merge_key = each.release.manifest.merge_key
                detail: dict[str, JsonValue] = {
                    "location": str(each.release.location),
                    "merge_key": merge_key,
                    "created": each.release.created,
                }
                columns = {
                    **NO_LEASE,
                    "merge_key": merge_key,
                    "report_path": each.report_path,
                    "excused_losses": 0,
                    "driver_losses": 0,
                    "lost_with": None,
                    "excused_faults": 0,
                    "suspect": False,
                    "failure_class": None,
                    "failure_message": None,
                }
                moves.append(Move(row, [Step(JobState.PUBLISHED, detail)], columns))
                release = each.release.model_dump_json(by_alias=True)
                rows.append({"job_id": row.id, "merge_key": merge_key, "release": release, "settled_at": now})
            make_moves(connection, moves, now)
            if rows:
                connection.execute(insert(releases), rows)
        return errors

    def fail(
        self,
        job_id: str,
        token: int,
        failure: FailureClass,
        message: str,
        decision: Decision,
        *,
        report_path: str | None = None,
        worker_lost: bool = False,
    ) -> None:
        """End an attempt that failed, and the lease with it.

        Args:
            job_id: of the job.
            token: of the lease.
            failure: the class of the error.
            message: of the error, for people.
            decision: what follows: RETRY_WAIT, FAILED, QUARANTINED or CANCELLED. A job that a user asked to cancel
                becomes CANCELLED, against the decision.
            report_path: parity report of the attempt, if it came that far.
            worker_lost: whether the attempt cost a worker.

        Raises:
            LeaseLostError: the token is stale or the lease has expired.
            InternalError: the decision is none of these, or CANCELLED although no one asked for it.
        """
        if decision.state not in _FAILURE_STATES:
            raise InternalError(f"job '{job_id}': expected a state that follows from failure, found {decision.state}")
        message = _storable(message)
        with self._database.write() as connection:
            row, now = lock_held(self._database, connection, job_id, token)
            state = JobState.CANCELLED if row.state == JobState.CANCELLING else decision.state
            detail: dict[str, JsonValue] = {
                "failure": failure.value,
                "message": message,
                "attempt": row.attempts,
                "worker_lost": worker_lost,
            }
            not_before = None
            if state is JobState.RETRY_WAIT:
                not_before = now + decision.delay_seconds
                detail["delay_seconds"] = decision.delay_seconds
            take_steps(
                connection,
                row,
                now,
                Step(state, detail),
                **NO_LEASE,
                not_before=not_before,
                worker_losses=row.worker_losses + worker_lost,
                suspect=row.suspect or decision.alone,
                failure_class=failure.value,
                failure_message=message,
                report_path=report_path,
            )

    def isolate(self, job_id: str, token: int, failure: FailureClass, message: str, reason: str) -> None:
        """Give a job back to the queue whose unit failed as a whole, likely by the fault of another job or of a GPU.

        The attempt does not count, nor is a lost worker held against it. From then on the leases of the job say that it
        is a suspect, until it is published or retried. A job that a user asked to cancel becomes CANCELLED.

        Args:
            job_id: of the job.
            token: of the lease.
            failure: one of `SUSPICIOUS_FAILURES`.
            message: of the error, for people.
            reason: why the job is not charged.

        Raises:
            LeaseLostError: the token is stale or the lease has expired.
            InternalError: the failure is none that makes a job a suspect.
        """
        if failure not in SUSPICIOUS_FAILURES:
            raise InternalError(f"job '{job_id}': expected a failure that makes a job a suspect, found {failure}")
        message = _storable(message)
        with self._database.write() as connection:
            row, now = lock_held(self._database, connection, job_id, token)
            state = JobState.CANCELLED if row.state == JobState.CANCELLING else JobState.QUEUED
            detail: dict[str, JsonValue] = {
                "reason": f"{reason}: not charged, runs alone next",
                "failure": failure.value,
                "message": message,
                "attempt": row.attempts,
                "worker_lost": False,
            }
            take_steps(
                connection,
                row,
                now,
                Step(state, detail),
                **NO_LEASE,
                attempts=row.attempts - _has_begun(row),
                excused_losses=row.excused_losses + 1,
                suspect=True,
                failure_class=failure.value,
                failure_message=message,
            )

    def let_go(self, job_id: str, token: int, reason: str, fault: Fault | None = None) -> None:
        """Give a job back to the queue, as if this attempt had not been; CANCELLED when a user asked for that.

        Args:
            job_id: of the job.
            token: of the lease.
            reason: why the attempt does not count.
            fault: of a place, where that is what ended the attempt.

        Raises:
            LeaseLostError: the token is stale or the lease has expired.
        """
        with self._database.write() as connection:
            row, now = lock_held(self._database, connection, job_id, token)
            state = JobState.CANCELLED if row.state == JobState.CANCELLING else JobState.QUEUED
            detail: dict[str, JsonValue] = {"reason": reason}
            columns: dict[str, Any] = {}
            if fault is not None:
                if fault.delay_seconds is not None and state is JobState.QUEUED:
                    state = JobState.RETRY_WAIT
                    columns = {"not_before": now + fault.delay_seconds}
                    detail["delay_seconds"] = fault.delay_seconds
                message = _storable(fault.message)
                detail |= {"place": fault.place, "failure": fault.failure.value, "message": message}
                columns |= {
                    "excused_faults": row.excused_faults + 1,
                    "failure_class": fault.failure.value,
                    "failure_message": message,
                }
            columns |= {**NO_LEASE, "attempts": row.attempts - _has_begun(row)}
            take_steps(connection, row, now, Step(state, detail), **columns)


def _has_begun(row: JobRow) -> bool:
    """Whether the attempt at hand has been counted."""
    return row.state not in (JobState.LEASED, JobState.CANCELLING)


def _storable(message: str) -> str:
    """Return a message as text that any database takes: it quotes names of files, which may hold any bytes."""
    return message.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
