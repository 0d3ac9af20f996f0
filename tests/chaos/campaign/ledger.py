"""The campaign's own sight of a ledger, through SQL alone: events as they were written; and steps of its clock."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, func, make_url, select, text, update
from sqlalchemy.exc import DBAPIError

from jobs.ledger.schema import events, jobs, metadata, pauses

_TIMES = frozenset(
    {"at", "created_at", "updated_at", "started_at", "seen_at", "ended_at", "since", "settled_at"}
    | {"lease_expires_at", "not_before", "probe_at"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An event, as the table has it."""

    job_id: str
    sequence: int
    state: str
    detail: dict[str, Any]


class LedgerSight:
    """Reads a ledger that others write. A store that does not answer is asked again."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.url = url
        self.path = Path(str(parsed.database))
        if self.is_sqlite:
            self._engine = create_engine(parsed, connect_args={"timeout": 30.0})
        else:
            self._engine = create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)

    def rows(self, query: Any) -> list[Any]:
        """Return the rows of a query."""
        while True:
            try:
                with self._engine.connect() as connection:
                    return list(connection.execute(query).all())
            except DBAPIError:
                time.sleep(0.5)

    def events(self) -> dict[str, list[Seen]]:
        """Return all events, by job, in order."""
        found: dict[str, list[Seen]] = {}
        for row in self.rows(select(events).order_by(events.c.job_id, events.c.sequence)):
            each = Seen(job_id=row.job_id, sequence=row.sequence, state=row.state, detail=json.loads(row.detail))
            found.setdefault(row.job_id, []).append(each)
        return found

    def events_of(self, job_id: str, after: int = 0) -> list[Seen]:
        """Return the events of one job after one of them."""
        where = (events.c.job_id == job_id, events.c.sequence > after)
        return [
            Seen(job_id=row.job_id, sequence=row.sequence, state=row.state, detail=json.loads(row.detail))
            for row in self.rows(select(events).where(*where).order_by(events.c.sequence))
        ]

    def count(self, state: str) -> int:
        """Return how often jobs have entered a state."""
        return int(self.rows(select(func.count()).where(events.c.state == state))[0][0])

    def jobs(self, *states: str) -> list[Any]:
        """Return the rows of jobs in some states; of all jobs without any."""
        query = select(jobs).order_by(jobs.c.number)
        return self.rows(query.where(jobs.c.state.in_(states)) if states else query)

    def pauses(self) -> list[Any]:
        """Return the pauses."""
        return self.rows(select(pauses))

    def step_clock(self, seconds: float) -> None:
        """Move every time that is stored, in one transaction: what a step of the clock the other way is to a ledger."""
        while True:
            try:
                with self._engine.begin() as connection:
                    for table in metadata.sorted_tables:
                        columns = [column for column in table.c if column.name in _TIMES]
                        if columns:
                            values = {column.name: column + seconds for column in columns}
                            connection.execute(update(table).values(values))
                    return
            except DBAPIError:
                time.sleep(0.5)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every writer out while the block lasts."""
        if self.is_sqlite:
            connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")
                connection.close()
            return
        with self._engine.begin() as locker:
            locker.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            yield

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()
