"""The ledger: a durable queue of jobs with leases and fencing tokens, and the log of everything that happened to them.

Every method is one transaction, so the ledger holds all of a step or nothing of it, whichever process dies. SQLite has
one writer at a time; Postgres locks rows, and drivers that claim at the same moment skip each other's.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from pydantic import JsonValue
from sqlalchemy import bindparam, case, func, insert, select, update

from jobs.errors import BadInputError, CancelledError, FailureClass, InternalError, MergefleetError
from jobs.ledger.admission import admit, candidate_of, destination_conflicts
from jobs.ledger.database import Database, batches, rows_where_in
from jobs.ledger.journal import Move, Step, make_moves, take_steps
from jobs.ledger.leases import (
    NO_LEASE,
    finish_lost_cancellations,
    held_jobs,
    lease_due_jobs,
    lock_held,
    lock_jobs,
    lost_lease,
)
from jobs.ledger.records import (
    Event,
    JobRecord,
    JobRow,
    Lease,
    ProgressReport,
    Publication,
    SubmitResult,
    event_of,
    record_of,
)
from jobs.ledger.schema import events, jobs, releases
from jobs.ledger.schema import labels as label_table
from jobs.request import MergeRequest
from jobs.states import (
    ACTIVE_STATES,
    CLAIMABLE_STATES,
    FINAL_STATES,
    RETRYABLE_STATES,
    STAGES,
    SUSPICIOUS_FAILURES,
    Decision,
    JobState,
)

__all__ = ["Event", "JobRecord", "JobStore", "Lease", "ProgressReport", "Publication", "SubmitResult"]

_FAILURE_STATES = frozenset({JobState.RETRY_WAIT, JobState.FAILED, JobState.QUARANTINED, JobState.CANCELLED})


class JobStore:
    """The ledger behind a URL. Safe for several threads; other processes and machines open their own.

    Raises, from every method: TransientIOError when the database does not answer, NoCapacityError when its disk is
    full. Nothing was written then.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` (on a disk of this machine: WAL does not work over a
            network) or `postgresql://user@host/name`. What is missing is made.

    Raises:
        BadInputError: the URL is of no known kind, what it names is no ledger, or it is one of a newer version.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def submit(self, requests: Sequence[MergeRequest]) -> SubmitResult:
        """Make jobs of requests: all or none. Returns when they are on the disk.

        A request that is a job already changes nothing, in any state of that job.

        Raises:
            BadInputError: an id has other content, or a destination belongs to another live or published job; lists
                all such conflicts.
        """
        candidates = [candidate_of(request) for request in requests]
        with self._database.write() as connection:
            self._database.lock_admission(connection)
            return admit(connection, candidates, self._database.now(connection))

    def claim(self, owner: str, limit: int, lease_seconds: float) -> tuple[Lease, ...]:
        """Lease jobs that are due, those of lost drivers included: higher priority first, then older submission.

        Cancelled jobs of lost drivers become CANCELLED on the way.

        Args:
            owner: names the driver, for people.
            limit: most jobs to lease.
            lease_seconds: time until the leases expire, unless they are extended.
        """
        if limit <= 0:
            return ()
        with self._database.write() as connection:
            now = self._database.now(connection)
            finish_lost_cancellations(connection, now)
            return lease_due_jobs(connection, now, owner, limit, now + lease_seconds)

    def extend(self, owner: str, leases: Mapping[str, int], lease_seconds: float) -> frozenset[str]:
        """Let leases expire `lease_seconds` from now.

        Args:
            owner: that claimed them.
            leases: the token of each job.
            lease_seconds: time until they expire.

        Returns:
            Ids whose lease is lost: expired, taken over, or ended.
        """
        held = set()
        with self._database.write() as connection:
            now = self._database.now(connection)
            # One statement for many, which locks and tells at once: a driver keeps thousands.
            extended = (
                update(jobs)
                .where(jobs.c.owner == owner, jobs.c.lease_expires_at > now)
                .values(lease_expires_at=now + lease_seconds)
                .returning(jobs.c.id, jobs.c.token)
            )
            for ids in batches(leases):
                for job_id, token in connection.execute(extended.where(jobs.c.id.in_(ids))):
                    if token == leases[job_id]:
                        held.add(job_id)
        return frozenset(leases) - held

    def cancelling(self, leases: Mapping[str, int]) -> frozenset[str]:
        """Return the ids among these leases that a user asked to cancel."""
        with self._database.read() as connection:
            # Few jobs are ever cancelling at a time, and a driver may hold thousands.
            query = select(jobs.c.id, jobs.c.token).where(jobs.c.state == JobState.CANCELLING)
            return frozenset(row.id for row in connection.execute(query) if row.token == leases.get(row.id))

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
            InternalError: the decision is none of these, or CANCELLED without anybody having asked.
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

    def cancel(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Cancel jobs: those that wait, or whose driver is lost, at once; those at work when their driver sees it.

        Returns:
            Ids of the jobs this call changed; not those that are cancelling already, or final.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
        """
        with self._database.write() as connection:
            rows, now = lock_jobs(self._database, connection, ids)
            moves = []
            for row in rows:
                if row.state in CLAIMABLE_STATES:
                    moves.append(Move(row, [Step(JobState.CANCELLED)], {"not_before": None}))
                elif row.state in ACTIVE_STATES and row.state != JobState.CANCELLING:
                    moves.append(Move(row, [Step(JobState.CANCELLING)], {"not_before": None}))
            make_moves(connection, moves, now)
            finish_lost_cancellations(connection, now)
            return tuple(move.row.id for move in moves)

    def retry(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Queue jobs again that failed, were cancelled or quarantined, or wait for their time; attempts start anew.

        Returns:
            Ids of the jobs this call changed.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
            BadInputError: destinations belong to other live or published jobs by now; lists all. Nothing was changed.
        """
        with self._database.write() as connection:
            self._database.lock_admission(connection)
            rows, now = lock_jobs(self._database, connection, ids)
            rows = [row for row in rows if row.state in RETRYABLE_STATES]
            if conflicts := destination_conflicts(connection, ((row.id, row.destination) for row in rows)):
                raise BadInputError("\n".join(conflicts))
            fresh = {
                "attempts": 0,
                "worker_losses": 0,
                "excused_losses": 0,
                "suspect": False,
                "not_before": None,
                "failure_class": None,
                "failure_message": None,
            }
            step = Step(JobState.QUEUED, {"reason": "retried"})
            make_moves(connection, [Move(row, [step], fresh) for row in rows], now)
            return tuple(row.id for row in rows)

    def jobs(
        self,
        *,
        ids: Collection[str] | None = None,
        states: Collection[JobState] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> tuple[JobRecord, ...]:
        """Return jobs in the order of their submission.

        Args:
            ids: only these; unknown ones are left out.
            states: only jobs in one of these.
            labels: only jobs that have all of these labels.
        """
        query = select(jobs, releases.c.release).outerjoin(releases).order_by(jobs.c.number)
        if states is not None:
            query = query.where(jobs.c.state.in_(states))
        for name, value in (labels or {}).items():
            has = select(label_table.c.job_id).where(label_table.c.name == name, label_table.c.value == value)
            query = query.where(jobs.c.id.in_(has))
        with self._database.read() as connection:
            if ids is None:
                rows: Sequence[JobRow] = connection.execute(query).all()
            else:
                rows = sorted(rows_where_in(connection, query, jobs.c.id, ids), key=lambda row: row.number)
        return tuple(record_of(row) for row in rows)

    def events(self, job_id: str) -> tuple[Event, ...]:
        """Return everything that happened to a job, oldest first; nothing for an unknown one."""
        query = select(events).where(events.c.job_id == job_id).order_by(events.c.sequence)
        with self._database.read() as connection:
            return tuple(event_of(row) for row in connection.execute(query))

    def counts(self) -> dict[JobState, int]:
        """Return the number of jobs in each state, zeros included."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        with self._database.read() as connection:
            found = {JobState(state): count for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}

    def seconds_until_due(self) -> float | None:
        """Return how long until something can be claimed, counting leases that would have to expire first.

        Returns:
            0 when something can be claimed now; None when nothing is left that ever could be.
        """
        due_at = case((jobs.c.state.in_(ACTIVE_STATES), jobs.c.lease_expires_at), else_=jobs.c.not_before)
        query = select(func.min(func.coalesce(due_at, 0.0))).where(jobs.c.state.not_in(FINAL_STATES))
        with self._database.read() as connection:
            earliest = connection.scalar(query)
            return None if earliest is None else max(0.0, earliest - self._database.now(connection))


def _storable(message: str) -> str:
    """Return a message as text that any database takes: it quotes names of files, which may hold any bytes."""
    return message.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
