"""Leases: who may work on a job, until when, and the fencing token that tells a driver it came too late.

All times are the database's. A lease is lost the moment it expires, even when nobody else has claimed the job yet.
"""

from collections.abc import Iterable, Mapping

from pydantic import JsonValue
from sqlalchemy import Connection, and_, or_, select, update

from jobs.database import Database, rows_where_in
from jobs.errors import LeaseLostError, NotFoundError
from jobs.journal import Step, take_steps
from jobs.records import JobRow, Lease, lease_of
from jobs.schema import jobs
from jobs.states import ACTIVE_STATES, CLAIMABLE_STATES, JobState

NO_LEASE = {"owner": None, "lease_expires_at": None}
"""Columns of a job that nobody holds."""


def finish_lost_cancellations(connection: Connection, now: float) -> None:
    """Make the jobs CANCELLED whose drivers were lost before they could stop."""
    query = select(jobs).where(jobs.c.state == JobState.CANCELLING, jobs.c.lease_expires_at <= now)
    for row in connection.execute(query.order_by(jobs.c.number).with_for_update(skip_locked=True)).all():
        take_steps(connection, row, now, Step(JobState.CANCELLED, loss(row)), **NO_LEASE)


def lease_due_jobs(connection: Connection, now: float, owner: str, limit: int, expires_at: float) -> tuple[Lease, ...]:
    """Lease up to `limit` jobs that wait for nothing, or whose lease has expired: by priority, then by age.

    Args:
        connection: in a transaction that may write.
        now: time of the claim, seconds.
        owner: names the driver.
        limit: most jobs to lease.
        expires_at: when the leases end, seconds.
    """
    is_due = or_(jobs.c.not_before.is_(None), jobs.c.not_before <= now)
    is_waiting = and_(jobs.c.state.in_(CLAIMABLE_STATES), is_due)
    is_lost = and_(jobs.c.state.in_(ACTIVE_STATES - {JobState.CANCELLING}), jobs.c.lease_expires_at <= now)
    query = select(jobs).where(or_(is_waiting, is_lost)).order_by(jobs.c.priority.desc(), jobs.c.number).limit(limit)
    leases = []
    for row in connection.execute(query.with_for_update(skip_locked=True)).all():
        lease = lease_of(row, row.token + 1, row.attempts + 1)
        steps = [Step(JobState.LEASED, {"owner": owner, "token": lease.token, "attempt": lease.attempts})]
        if row.owner is not None:
            steps.insert(0, Step(JobState.QUEUED, loss(row)))
        take_steps(
            connection,
            row,
            now,
            *steps,
            owner=owner,
            token=lease.token,
            attempts=lease.attempts,
            lease_expires_at=expires_at,
            not_before=None,
            stage=None,
            bytes_done=0,
            bytes_total=0,
        )
        leases.append(lease)
    return tuple(leases)


def extend_leases(database: Database, connection: Connection, leases: Mapping[str, int], seconds: float) -> set[str]:
    """Let the leases that still hold expire `seconds` from now; return their ids.

    Args:
        database: knows the time.
        connection: in a transaction that may write.
        leases: the token of each job.
        seconds: time until they expire.
    """
    query = select(jobs).order_by(jobs.c.number).with_for_update()
    rows = rows_where_in(connection, query, jobs.c.id, leases)
    now = database.now(connection)
    held = [row for row in rows if _why_lost(row, leases[row.id], now) is None]
    for row in held:
        connection.execute(update(jobs).where(jobs.c.number == row.number).values(lease_expires_at=now + seconds))
    return {row.id for row in held}


def lock_jobs(database: Database, connection: Connection, ids: Iterable[str]) -> tuple[list[JobRow], float]:
    """Lock the rows of jobs until the transaction ends; return them, oldest first, and the time.

    Raises:
        NotFoundError: some ids are no jobs; lists them.
    """
    wanted = list(ids)
    query = select(jobs).order_by(jobs.c.number).with_for_update()
    rows = rows_where_in(connection, query, jobs.c.id, wanted)
    if unknown := set(wanted) - {row.id for row in rows}:
        raise NotFoundError(f"store {database.name} has no job {', '.join(sorted(unknown))}")
    return rows, database.now(connection)


def lock_held(database: Database, connection: Connection, job_id: str, token: int) -> tuple[JobRow, float]:
    """Lock the row of a job that this token holds; return it and the time.

    Raises:
        NotFoundError: there is no such job.
        LeaseLostError: the token does not hold it.
    """
    (row,), now = lock_jobs(database, connection, [job_id])
    if reason := _why_lost(row, token, now):
        raise LeaseLostError(f"job '{job_id}': lease lost, {reason}")
    return row, now


def loss(row: JobRow) -> dict[str, JsonValue]:
    """Return what the log says of a lease that expired."""
    return {"reason": "lease expired", "owner": row.owner, "token": row.token, "state": row.state}


def _why_lost(row: JobRow, token: int, now: float) -> str | None:
    """Say why a token does not hold a job, or None when it does."""
    if row.token != token:
        return f"its token is {row.token} by now, not {token}"
    if row.state not in ACTIVE_STATES:
        return f"the attempt has ended and the job is {row.state}"
    if row.lease_expires_at <= now:
        return f"it expired {now - row.lease_expires_at:.1f} seconds ago"
    return None
