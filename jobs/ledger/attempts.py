"""The attempts of the ledger: how far a leased job is, and how an attempt ends."""

from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue
from sqlalchemy import bindparam, insert, update

from jobs.errors import CancelledError, FailureClass, InternalError, MergefleetError
from jobs.ledger.database import Database
from jobs.ledger.journal import Move, Step, make_moves, take_steps
from jobs.ledger.leases import NO_LEASE, held_jobs, lock_held, lock_jobs, lost_lease
from jobs.ledger.records import ProgressReport, Publication
from jobs.ledger.schema import jobs, releases
from jobs.states import STAGES, SUSPICIOUS_FAILURES, Decision, JobState

_FAILURE_STATES = frozenset({JobState.RETRY_WAIT, JobState.FAILED, JobState.QUARANTINED, JobState.CANCELLED})


class Attempts:
    """The side of the ledger that the holder of a lease writes."""

    _database: Database

    def advance(
        self, leases: Mapping[str, int], state: JobState, merge_keys: Mapping[str, str | None] | None = None
    ) -> dict[str, MergefleetError]:
        """Move jobs on to a stage of the work, through those between, each of which is logged.

        Args:
            leases: the token of each job.
            state: PLANNING, MERGING, VERIFYING or PUBLISHING; a job that is there already, or further, stays.
            merge_keys: of the releases to come, by job, when they have become known.

        Returns:
            Why jobs were not moved, by id: LeaseLostError when the token is stale or the lease has expired, so that the
            driver must not write for this job; CancelledError when a user asked to cancel it: stop, then `fail` or
            `let_go`.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
            InternalError: the state is no stage of the work.
        """
        if state not in STAGES:
            raise InternalError(f"expected a stage of the work to advance to, found {state}")
        order = (JobState.LEASED, *STAGES)
        errors: dict[str, MergefleetError] = {}
        moves = []
        with self._database.write() as connection:
            rows, now = lock_jobs(self._database, connection, leases)
            for row in rows:
                if lost := lost_lease(row, leases[row.id], now):
                    errors[row.id] = lost
                elif row.state == JobState.CANCELLING:
                    errors[row.id] = CancelledError(f"job '{row.id}': asked to stop before {state}")
                elif steps := order[order.index(JobState(row.state)) + 1 : order.index(state) + 1]:
                    columns = {"merge_key": merge_keys[row.id]} if merge_keys is not None else {}
                    moves.append(Move(row, [Step(each) for each in steps], columns))
            make_moves(connection, moves, now)
        return errors

    def report_progress(self, reports: Iterable[ProgressReport]) -> frozenset[str]:
        """Note how far the work on some jobs is; makes no event.

        Args:
            reports: at most one for each job.

        Returns:
            Ids whose lease is lost: expired, taken over, or ended.
        """
        by_id = {report.job_id: report for report in reports}
        if not by_id:
            return frozenset()
        with self._database.write() as connection:
            leases = {job_id: report.token for job_id, report in by_id.items()}
            held, now = held_jobs(self._database, connection, leases)
            rows = [
                {
                    "in_row": number,
                    "stage": by_id[job_id].stage,
                    "bytes_done": by_id[job_id].bytes_done,
                    "bytes_total": by_id[job_id].bytes_total,
                    "updated_at": now,
                }
                for job_id, number in held.items()
            ]
            if rows:
                connection.execute(update(jobs).where(jobs.c.number == bindparam("in_row")), rows)
            return frozenset(by_id) - held.keys()

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
                suspect=row.suspect or failure in SUSPICIOUS_FAILURES,
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
                attempts=row.attempts - 1,
                excused_losses=row.excused_losses + 1,
                suspect=True,
                failure_class=failure.value,
                failure_message=message,
            )

    def let_go(self, job_id: str, token: int, reason: str) -> None:
        """Give a job back to the queue, as if this attempt had not been; CANCELLED when a user asked for that.

        Raises:
            LeaseLostError: the token is stale or the lease has expired.
        """
        with self._database.write() as connection:
            row, now = lock_held(self._database, connection, job_id, token)
            state = JobState.CANCELLED if row.state == JobState.CANCELLING else JobState.QUEUED
            step = Step(state, {"reason": reason})
            take_steps(connection, row, now, step, **NO_LEASE, attempts=row.attempts - 1)


def _storable(message: str) -> str:
    """Return a message as text that any database takes: it quotes names of files, which may hold any bytes."""
    return message.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
