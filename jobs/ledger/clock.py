"""Steps of the database's clock. One forward makes leases and waits end early, which costs time and no more.

One back makes them last for as much longer: the leases of a dead driver, a place at rest, a job that waits would be
kept for hours. Drivers note every few seconds that they live, so that a note from the future tells of such a step.
"""

from sqlalchemy import Connection, func, select, update

from jobs.ledger.schema import drivers, jobs, pauses

_SLACK_SECONDS = 5.0
"""What clocks of servers are corrected by without a step."""


def follow_clock(connection: Connection, now: float) -> None:
    """Where the clock has stepped back, have what waits and what is leased end as long from now as it was to.

    Args:
        connection: in a transaction that may write.
        now: the time, seconds.
    """
    last = connection.scalar(select(func.max(drivers.c.seen_at)))
    if last is None or last - now < _SLACK_SECONDS:
        return
    step = last - now
    for column in (jobs.c.lease_expires_at, jobs.c.not_before, pauses.c.probe_at):
        connection.execute(update(column.table).where(column > now).values({column: column - step}))
    connection.execute(update(drivers).where(drivers.c.seen_at > now).values(seen_at=now))
