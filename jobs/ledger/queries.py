"""The questions to the ledger; they change nothing."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, case, func, select

from jobs.errors import FailureClass, NotFoundError
from jobs.ledger.database import Database, rows_where_in
from jobs.ledger.pauses import Cause, Scope, read_pauses
from jobs.ledger.records import BatchRecord, Event, JobRecord, Work
from jobs.ledger.rows import JobRow, event_of, record_of
from jobs.ledger.schema import batches, events, jobs, releases
from jobs.ledger.selection import ALL, Selection
from jobs.places import is_covered, locations_of
from jobs.request import MergeRequest
from jobs.states import ACTIVE_STATES, FINAL_STATES, JobState

Order = Literal["submitted", "updated", "priority"]
ORDERS: Mapping[Order, tuple[ColumnElement[Any], ...]] = {
    "submitted": (jobs.c.number,),
    "updated": (jobs.c.updated_at.desc(), jobs.c.number),
    "priority": (jobs.c.priority.desc(), jobs.c.number),
}


_NEVER_DUE = FINAL_STATES | {JobState.AWAITING_APPROVAL}

_MAX_LOOKED_AT = 100
"""Requests that name a place, and are looked at to see whether they mean it."""


class Queries:
    """The side of the ledger that is read."""

    _database: Database

    def jobs(
        self,
        selection: Selection = ALL,
        *,
        order: Order = "submitted",
        limit: int | None = None,
        skip: int = 0,
    ) -> tuple[JobRecord, ...]:
        """Return jobs: a page of them where there is a limit.

        Args:
            selection: which.
            order: by submission, by last change (newest first), or by priority (highest first).
            limit: how many at most.
            skip: how many of the first are left out.
        """
        query = selection.narrow(select(jobs, releases.c.release).outerjoin(releases)).order_by(*ORDERS[order])
        with self._database.read() as connection:
            if selection.ids is None:
                rows: Sequence[JobRow] = connection.execute(query.limit(limit).offset(skip)).all()
            else:
                # Many ids are asked for in pieces: each is in order, and all of them are not.
                found = rows_where_in(connection, query, jobs.c.id, selection.ids)
                keys = {
                    "submitted": lambda row: row.number,
                    "updated": lambda row: (-row.updated_at, row.number),
                    "priority": lambda row: (-row.priority, row.number),
                }
                found.sort(key=keys[order])
                rows = found[skip : None if limit is None else skip + limit]
        return tuple(record_of(row) for row in rows)

    def ids(self, selection: Selection = ALL) -> tuple[str, ...]:
        """Return the ids of jobs in the order of their submission."""
        query = selection.narrow(select(jobs.c.id, jobs.c.number)).order_by(jobs.c.number)
        with self._database.read() as connection:
            if selection.ids is None:
                return tuple(row.id for row in connection.execute(query))
            rows = rows_where_in(connection, query, jobs.c.id, selection.ids)
        return tuple(row.id for row in sorted(rows, key=lambda row: row.number))

    def events(self, job_id: str, after: int = 0) -> tuple[Event, ...]:
        """Return what happened to a job, oldest first; nothing for an unknown one.

        Args:
            job_id: of the job.
            after: only events with a higher number than this.
        """
        query = select(events).where(events.c.job_id == job_id, events.c.sequence > after).order_by(events.c.sequence)
        with self._database.read() as connection:
            return tuple(event_of(row) for row in connection.execute(query))

    def events_of(self, selection: Selection) -> tuple[Event, ...]:
        """Return what happened to jobs, each job's events in their order; of `selection` all but ids count."""
        query = selection.narrow(select(events).join(jobs, jobs.c.id == events.c.job_id))
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(events.c.job_id, events.c.sequence))
            return tuple(event_of(row) for row in rows)

    def counts(self, selection: Selection = ALL) -> dict[JobState, int]:
        """Return the number of jobs in each state, zeros included; of `selection` all but ids count."""
        query = selection.narrow(select(jobs.c.state, func.count())).group_by(jobs.c.state)
        with self._database.read() as connection:
            found = {JobState(state): count for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}

    def num_held(self, selection: Selection = ALL) -> dict[str, int]:
        """Return how many jobs that wait are known to be held, by the pause that holds them."""
        query = selection.narrow(select(jobs.c.held_by, func.count())).where(jobs.c.held_by != "")
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query.group_by(jobs.c.held_by))}

    def batches(self) -> tuple[BatchRecord, ...]:
        """Return all batches, oldest first, with their counts."""
        query = select(jobs.c.batch, jobs.c.state, func.count()).group_by(jobs.c.batch, jobs.c.state)
        with self._database.read() as connection:
            rows = connection.execute(select(batches).order_by(batches.c.created_at, batches.c.name)).all()
            found = {row.name: dict.fromkeys(JobState, 0) for row in rows}
            for batch, state, count in connection.execute(query):
                found[batch][JobState(state)] = count
        return tuple(BatchRecord(name=row.name, created_at=row.created_at, counts=found[row.name]) for row in rows)

    def batch(self, name: str) -> BatchRecord:
        """Return one batch with its counts.

        Raises:
            NotFoundError: there is none of this name.
        """
        query = select(jobs.c.state, func.count()).where(jobs.c.batch == name).group_by(jobs.c.state)
        with self._database.read() as connection:
            row = connection.execute(select(batches).where(batches.c.name == name)).first()
            if row is None:
                raise NotFoundError(f"no such batch: {name}")
            found = {JobState(state): count for state, count in connection.execute(query)}
        counts = {state: found.get(state, 0) for state in JobState}
        return BatchRecord(name=row.name, created_at=row.created_at, counts=counts)

    def work(self, selection: Selection = ALL) -> tuple[Work, ...]:
        """Return how far the work on each base is; of `selection` all but ids count."""
        columns = (jobs.c.base, jobs.c.state, jobs.c.stage)
        num_planned = func.sum(case((jobs.c.bytes_total > 0, 1), else_=0))
        sums = (func.count(), num_planned, func.sum(jobs.c.bytes_done), func.sum(jobs.c.bytes_total))
        query = selection.narrow(select(*columns, *sums)).group_by(*columns).order_by(*columns)
        with self._database.read() as connection:
            return tuple(
                Work(
                    base=base,
                    state=JobState(state),
                    stage=stage if state in ACTIVE_STATES else None,
                    num_jobs=count,
                    num_planned=int(planned),
                    bytes_done=int(done),
                    bytes_total=int(total),
                )
                for base, state, stage, count, planned, done, total in connection.execute(query)
            )

    def failures(self, selection: Selection = ALL) -> tuple[tuple[str, FailureClass, str], ...]:
        """Return id, class and message of jobs that failed for good, oldest first; of `selection` all but ids count."""
        query = selection.narrow(select(jobs.c.id, jobs.c.failure_class, jobs.c.failure_message)).where(
            jobs.c.state.in_([JobState.FAILED, JobState.QUARANTINED])
        )
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(jobs.c.number)).all()
        return tuple((row.id, FailureClass(row.failure_class), row.failure_message) for row in rows)

    def has_published(self, place: str) -> bool:
        """Return whether a job was published, by whichever driver, that reads from a place or writes to it.

        Args:
            place: as `jobs.places` names it, of a bucket, the Hub or a file system.
        """
        named = jobs.c.request.contains(place.removeprefix("file://"), autoescape=True)
        query = select(jobs.c.request).where(jobs.c.state == JobState.PUBLISHED, named).limit(_MAX_LOOKED_AT)
        with self._database.read() as connection:
            requests = (MergeRequest.model_validate_json(text) for text in connection.scalars(query))
            return any(is_covered(location, place) for request in requests for location in locations_of(request))

    def now(self) -> float:
        """Return the time on the store's clock, seconds since 1970."""
        with self._database.read() as connection:
            return self._database.now(connection)

    def seconds_until_due(self) -> float | None:
        """Return how long until something can be claimed, counting leases that would have to expire first.

        What an operator has paused, or a person has to approve, does not count. A place that is paused for a fault is
        tried when its rest is over.

        Returns:
            0 when something can be claimed now; None when nothing is left that ever could be.
        """
        due_at = case((jobs.c.state.in_(ACTIVE_STATES), jobs.c.lease_expires_at), else_=jobs.c.not_before)
        query = select(jobs.c.held_by, func.min(func.coalesce(due_at, 0.0))).where(jobs.c.state.not_in(_NEVER_DUE))
        with self._database.read() as connection:
            found = {row[0]: row[1] for row in connection.execute(query.group_by(jobs.c.held_by))}
            all_pauses = read_pauses(connection)
            by_people = [pause for pause in all_pauses if pause.cause is Cause.OPERATOR]
            if any(pause.scope is Scope.QUEUE for pause in by_people):
                query = query.where(jobs.c.state.in_(ACTIVE_STATES))
                found = {row[0]: row[1] for row in connection.execute(query.group_by(jobs.c.held_by))}
            keys = {pause.key for pause in by_people}
            rests = {pause.key: pause.probe_at or 0.0 for pause in all_pauses if pause.cause is Cause.FAULT}
            due = (max(at, rests.get(key, 0.0)) for key, at in found.items() if key not in keys)
            earliest = min(due, default=None)
            return None if earliest is None else max(0.0, earliest - self._database.now(connection))
