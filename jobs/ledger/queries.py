"""The questions to the ledger; they change nothing."""

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import case, func, select

from jobs.ledger.database import Database, rows_where_in
from jobs.ledger.records import Event, JobRecord
from jobs.ledger.rows import JobRow, event_of, record_of
from jobs.ledger.schema import events, jobs, releases
from jobs.ledger.schema import labels as label_table
from jobs.states import ACTIVE_STATES, FINAL_STATES, JobState


class Queries:
    """The side of the ledger that is read."""

    _database: Database

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
