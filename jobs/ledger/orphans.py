"""What becomes of jobs whose driver was lost: queued again, uncharged, and which of them may be why drivers die.

No one can tell from outside whether a job takes its driver's machine down or only happened to be there. Two things tell
in time. A driver that dies without a job, after one died with it, acquits it: drivers die of something else. And a job
that was there twice in a row runs alone and waits before it does, the longer the more often: what is innocent is then
elsewhere when the next driver dies. Only a job that was at work each time, so often in a row, is not tried again.
"""

import random
from typing import Any

from sqlalchemy import Connection, and_, or_, select, update

from jobs.ledger.database import in_pieces
from jobs.ledger.journal import Move, Step, make_moves
from jobs.ledger.leases import NO_LEASE, loss
from jobs.ledger.rows import JobRow
from jobs.ledger.schema import jobs
from jobs.states import JobState

_FIRST_WAIT_SECONDS = 10.0
_MAX_WAIT_SECONDS = 300.0
"""Longest wait of a job that was at work at the second loss of a driver in a row; doubles with each one."""


def queue_orphans(connection: Connection, now: float, limit: int) -> None:
    """Queue the jobs again whose lease has expired, and end those that a user asked to cancel.

    The attempt of a lost driver does not count.

    Args:
        connection: in a transaction that may write.
        now: the time, seconds.
        limit: how many, at most.
    """
    query = select(jobs).where(jobs.c.lease_expires_at <= now).order_by(jobs.c.lease_expires_at).limit(limit)
    rows = connection.execute(query.with_for_update(skip_locked=True)).all()
    if not rows:
        return
    make_moves(connection, [_move(row, now) for row in rows], now)
    _acquit(connection, {row.owner for row in rows})


def _move(row: JobRow, now: float) -> Move:
    is_cancelled = row.state == JobState.CANCELLING
    has_begun = row.state not in (JobState.LEASED, JobState.CANCELLING)
    losses = row.driver_losses + has_begun
    columns: dict[str, Any] = {
        **NO_LEASE,
        "attempts": row.attempts - has_begun,
        "driver_losses": losses,
        "lost_with": row.owner if has_begun else row.lost_with,
        "suspect": row.suspect or losses > 1,
        "not_before": None,
    }
    detail = loss(row)
    state = JobState.CANCELLED if is_cancelled else JobState.QUEUED
    if has_begun and losses > 1:
        state = JobState.RETRY_WAIT
        longest = min(_MAX_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** min(losses - 2, 32))
        wait = random.uniform(longest / 2, longest)  # noqa: S311 - apart from others that were there, not secret
        columns["not_before"] = now + wait
        detail |= {"driver_losses": losses, "delay_seconds": wait}
    return Move(row, [Step(state, detail)], columns)


def _acquit(connection: Connection, owners: set[str]) -> None:
    """Forget earlier losses of drivers for the jobs that these drivers did not have at work."""
    elsewhere = and_(jobs.c.lost_with.not_in(owners), or_(jobs.c.owner.is_(None), jobs.c.owner.not_in(owners)))
    query = select(jobs.c.number).where(jobs.c.driver_losses > 0, elsewhere)
    # Not those that another process writes just now: it may wait for a job that is locked here.
    numbers = connection.scalars(query.with_for_update(skip_locked=True)).all()
    for some in in_pieces(numbers):
        acquitted = update(jobs).where(jobs.c.number.in_(some))
        connection.execute(acquitted.values(driver_losses=0, lost_with=None))
