"""Long lists of the ledger in pieces: pages of jobs that do not shift, and changes since a moment."""

import base64
import binascii
import json
import math
from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, tuple_

from jobs.errors import InvalidValueError
from jobs.ledger.database import Database
from jobs.ledger.queries import ORDERS, Order
from jobs.ledger.records import Event, JobPage
from jobs.ledger.rows import JobRow, event_of, record_of
from jobs.ledger.schema import events, jobs, releases
from jobs.ledger.selection import ALL, Selection

_MAX_NUMBER = 2**63 - 1
_MAX_CHANGES = 1000


class Paging:
    """The side of the ledger that is read piece by piece."""

    _database: Database

    def page(
        self, selection: Selection = ALL, *, order: Order = "submitted", limit: int, cursor: str | None = None
    ) -> JobPage:
        """Return some jobs, and how to ask for the next. A job that is added or moves makes no other appear twice.

        Args:
            selection: which; at most 500 ids.
            order: by submission, by last change (newest first), or by priority (highest first).
            limit: how many at most.
            cursor: of the page before; None for the first.

        Raises:
            InvalidValueError: the cursor is none, or one of another order.
        """
        query = selection.narrow(select(jobs, releases.c.release).outerjoin(releases)).order_by(*ORDERS[order])
        if selection.ids is not None:
            query = query.where(jobs.c.id.in_(selection.ids))
        if cursor is not None:
            query = query.where(_after(order, cursor))
        with self._database.read() as connection:
            rows = connection.execute(query.limit(limit + 1)).all()
        next_cursor = _cursor(order, rows[limit - 1]) if len(rows) > limit else None
        return JobPage(jobs=tuple(record_of(row) for row in rows[:limit]), next_cursor=next_cursor)

    def changes(self, since: float, until: float | None = None) -> Iterator[Event]:
        """Yield what happened to all jobs in a time, oldest first; each piece is a transaction of its own.

        Args:
            since: seconds since 1970; events of this very moment are among them.
            until: only events before this time.
        """
        order = (events.c.at, events.c.job_id, events.c.sequence)
        query = select(events).where(events.c.at >= since).order_by(*order).limit(_MAX_CHANGES)
        if until is not None:
            query = query.where(events.c.at < until)
        last: JobRow | None = None
        while True:
            later = query if last is None else query.where(tuple_(*order) > (last.at, last.job_id, last.sequence))
            with self._database.read() as connection:
                rows = connection.execute(later).all()
            yield from map(event_of, rows)
            if len(rows) < _MAX_CHANGES:
                return
            last = rows[-1]

    def settling_seconds(self) -> float:
        """Return how long after the time of an event it may still appear: none where writers go one after the other."""
        return self._database.settling_seconds


def _key(order: Order, row: JobRow) -> list[Any]:
    match order:
        case "submitted":
            return [row.number]
        case "updated":
            return [row.updated_at, row.number]
        case "priority":
            return [row.priority, row.number]


def _cursor(order: Order, row: JobRow) -> str:
    return base64.urlsafe_b64encode(json.dumps([order, *_key(order, row)]).encode()).decode()


def _after(order: Order, cursor: str) -> ColumnElement[bool]:
    """Return what is true of jobs that come after those of the page that gave the cursor."""
    try:
        found = json.loads(base64.b64decode(cursor.encode(), altchars=b"-_", validate=True))
        name, *key = found
    except (ValueError, TypeError, binascii.Error, RecursionError):
        name, key = None, []
    if name != order or len(key) != len(ORDERS[order]) or not all(map(_is_number, key)):
        raise InvalidValueError(f"the next_cursor of a page in the order '{order}'", repr(cursor[:100]))
    number: ColumnElement[bool] = jobs.c.number > key[-1]
    if order == "submitted":
        return number
    column = jobs.c.updated_at if order == "updated" else jobs.c.priority
    return or_(column < key[0], and_(column == key[0], number))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _MAX_NUMBER  # type: ignore[arg-type]
