"""Leases: who may work on a job, until when, and the fencing token that tells a driver it came too late.

All times are the database's. A lease is lost the moment it expires, even when no other driver has claimed the job yet.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Connection, select

from jobs.errors import LeaseLostError, NotFoundError
from jobs.ledger.database import Database, rows_where_in
from jobs.ledger.rows import JobRow
from jobs.ledger.schema import jobs
from jobs.states import ACTIVE_STATES, JobState

NO_LEASE = {"owner": None, "lease_expires_at": None}
"""Columns of a job without a lease."""


def held_jobs(database: Database, connection: Connection, leases: Mapping[str, int]) -> tuple[dict[str, int], float]:
    """Lock the rows of jobs until the transaction ends; return the numbers of those that are held, and the time.

    Args:
        database: knows the time.
        connection: in a transaction that may write.
        leases: the token of each job.

    Returns:
        The number, by id, of each job whose lease still holds.
    """
    # Not whole rows: a driver keeps thousands of leases, and requests are long.
    columns = (jobs.c.number, jobs.c.id, jobs.c.token, jobs.c.state, jobs.c.lease_expires_at)
    query = select(*columns).order_by(jobs.c.number).with_for_update()
    rows = rows_where_in(connection, query, jobs.c.id, leases)
    now = database.now(connection)
    return {row.id: row.number for row in rows if _why_lost(row, leases[row.id], now) is None}, now


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


def lock_many(
    database: Database, connection: Connection, ids: Iterable[str], *columns: ColumnElement[Any]
) -> tuple[dict[JobState, list[JobRow]], float]:
    """Lock the rows of very many jobs until the transaction ends; return some columns of them by state, and the time.

    Raises:
        NotFoundError: some ids are no jobs; lists them.
    """
    wanted = list(ids)
    query = select(jobs.c.number, jobs.c.id, jobs.c.state, *columns).order_by(jobs.c.number).with_for_update()
    rows = rows_where_in(connection, query, jobs.c.id, wanted)
    if unknown := set(wanted) - {row.id for row in rows}:
        raise NotFoundError(f"store {database.name} has no job {', '.join(sorted(unknown))}")
    by_state: dict[JobState, list[JobRow]] = {}
    for row in sorted(rows, key=lambda row: row.number):
        by_state.setdefault(JobState(row.state), []).append(row)
    return by_state, database.now(connection)


def lock_held(database: Database, connection: Connection, job_id: str, token: int) -> tuple[JobRow, float]:
    """Lock the row of a job that this token holds; return it and the time.

    Raises:
        NotFoundError: there is no such job.
        LeaseLostError: the token does not hold it.
    """
    (row,), now = lock_jobs(database, connection, [job_id])
    if error := lost_lease(row, token, now):
        raise error
    return row, now


def lost_lease(row: JobRow, token: int, now: float) -> LeaseLostError | None:
    """Return the error for a token that does not hold a job, or None when it does."""
    reason = _why_lost(row, token, now)
    return LeaseLostError(f"job '{row.id}': lease lost, {reason}") if reason else None


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
