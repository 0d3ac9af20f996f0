"""Pauses: what is kept from being claimed, by whom and why; and the jobs that find out whether a place works again."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, insert, select, update

from jobs.errors import BadInputError, FailureClass, NotFoundError
from jobs.ledger.database import Database
from jobs.ledger.deliveries import Message, MessageKind, tell
from jobs.ledger.holding import hold, key_of, let_go
from jobs.ledger.schema import batches, jobs, pauses
from jobs.places import is_covered, locations_of
from jobs.request import MergeRequest
from jobs.states import ACTIVE_STATES, STAGES, JobState


class Scope(StrEnum):
    """What a pause keeps back."""

    QUEUE = "queue"
    BATCH = "batch"
    BASE = "base"
    PLACE = "place"


class Cause(StrEnum):
    """Why it does."""

    OPERATOR = "operator"
    """A person said so; it ends when one says so."""
    FAULT = "fault"
    """A driver found the place at fault; it ends when a job gets past it, or when a person says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """One pause. Times are seconds since 1970 on the store's clock."""

    scope: Scope
    name: str
    """Of the batch, base (as requests write it) or place; nothing for the queue."""
    cause: Cause
    since: float
    by: str
    reason: str
    failure_class: FailureClass | None = None
    state: JobState | None = None
    """How far the job was that met the fault: one that gets further has got past it."""
    probe_at: float | None = None
    """When a job may go ahead to find out; None where only a person ends the pause."""
    probe: str | None = None
    """The job that does."""
    num_faults: int = 0
    """How often the place was found at fault, in a row."""

    @property
    def key(self) -> str:
        """What jobs that are held by it name."""
        return key_of(self.scope, self.name)

    def covers(self, request: MergeRequest, batch: str) -> bool:
        """Whether it keeps back a job."""
        match self.scope:
            case Scope.QUEUE:
                return True
            case Scope.BATCH:
                return self.name == batch
            case Scope.BASE:
                return self.name == str(request.base)
            case Scope.PLACE:
                return any(is_covered(location, self.name) for location in locations_of(request))


class Pauses:
    """The side of the ledger that keeps jobs back."""

    _database: Database

    def pauses(self) -> tuple[Pause, ...]:
        """Return all pauses, oldest first."""
        with self._database.read() as connection:
            return read_pauses(connection)

    def pause(self, scope: Scope, name: str, by: str, reason: str) -> bool:
        """Keep jobs from being claimed until `resume`; those at work go on.

        Args:
            scope: of what.
            name: of the batch, base or place; nothing for the queue.
            by: the person who says so.
            reason: in their words.

        Returns:
            Whether it was not paused by a person before.

        Raises:
            NotFoundError: there is no such batch, or no job of such a base.
        """
        with self._database.write() as connection:
            self._database.lock_admission(connection)
            known = {Scope.BATCH: batches.c.name == name, Scope.BASE: jobs.c.base == name}.get(scope)
            if known is not None and connection.execute(select(1).where(known).limit(1)).first() is None:
                raise NotFoundError(f"store {self._database.name} has no {scope} {name}")
            where = _is(scope, name, Cause.OPERATOR)
            if connection.execute(select(pauses.c.scope).where(where)).first() is not None:
                return False
            values = {"scope": scope, "name": name, "cause": Cause.OPERATOR, "by": by, "reason": reason}
            connection.execute(insert(pauses).values(**values, since=self._database.now(connection), num_faults=0))
            hold(connection, scope, name)
            made = _pause_of(connection.execute(select(pauses).where(where)).one())
            _tell(connection, MessageKind.PLACE_PAUSED, [made], made.since)
            return True

    def resume(self, scope: Scope, name: str) -> tuple[Pause, ...]:
        """End the pauses of one thing, whoever made them.

        Returns:
            What has ended; nothing when it was not paused.
        """
        with self._database.write() as connection:
            where = and_(pauses.c.scope == scope, pauses.c.name == name)
            ended = tuple(_pause_of(row) for row in connection.execute(select(pauses).where(where)))
            if ended:
                connection.execute(delete(pauses).where(where))
                let_go(connection, key_of(scope, name))
                _tell(connection, MessageKind.PLACE_RESUMED, ended, self._database.now(connection))
            return ended

    def pause_place(
        self,
        place: str,
        job_id: str,
        *,
        by: str,
        failure: FailureClass,
        reason: str,
        state: JobState,
        first_seconds: float,
        max_seconds: float,
    ) -> Pause | None:
        """Pause a place that was found at fault; the longer, the more often in a row it was.

        Args:
            place: as `jobs.places` names it.
            job_id: the job that met the fault.
            by: the driver.
            failure: class of the error.
            reason: the error, for people.
            state: how far the job was.
            first_seconds: how long it rests the first time; doubles with each fault in a row.
            max_seconds: longest rest.

        Returns:
            The pause; None when it is paused already, and this job was not sent ahead to try it: that is no news.
        """
        with self._database.write() as connection:
            self._database.lock_admission(connection)  # two drivers may meet the same fault at one moment
            now = self._database.now(connection)
            where = _is(Scope.PLACE, place, Cause.FAULT)
            row = connection.execute(select(pauses).where(where).with_for_update()).first()
            if row is not None and row.probe != job_id:
                return None
            num_faults = 1 if row is None else row.num_faults + 1
            rest = min(max_seconds, first_seconds * 2.0 ** min(num_faults - 1, 64))
            values = {
                "by": by,
                "reason": reason,
                "failure_class": failure.value,
                "state": state.value,
                "probe_at": now + rest,
                "probe": None,
                "num_faults": num_faults,
            }
            if row is None:
                key = {"scope": Scope.PLACE, "name": place, "cause": Cause.FAULT}
                connection.execute(insert(pauses).values(**key, since=now, **values))
                hold(connection, Scope.PLACE, place)
            else:
                connection.execute(update(pauses).where(where).values(**values))
            made = _pause_of(connection.execute(select(pauses).where(where)).one())
            if row is None:
                _tell(connection, MessageKind.PLACE_PAUSED, [made], now)
            return made

    def passed(self, job_id: str, state: JobState) -> tuple[Pause, ...]:
        """End the pauses of places that a job was sent ahead to try, and got past.

        Args:
            job_id: of the job.
            state: how far it is: further than the job was that met the fault.

        Returns:
            What has ended.
        """
        order = (JobState.LEASED, *STAGES, JobState.PUBLISHED)
        with self._database.write() as connection:
            where = and_(pauses.c.cause == Cause.FAULT, pauses.c.probe == job_id)
            found = [_pause_of(row) for row in connection.execute(select(pauses).where(where).with_for_update())]
            ended = tuple(each for each in found if each.state is None or order.index(state) > order.index(each.state))
            for pause in ended:
                connection.execute(delete(pauses).where(_is(pause.scope, pause.name, pause.cause)))
                if not _is_paused(connection, pause.scope, pause.name):
                    let_go(connection, pause.key)
            _tell(connection, MessageKind.PLACE_RESUMED, ended, self._database.now(connection))
            return ended

    def send_probe(self, place: str, job_id: str) -> None:
        """Note that a job goes ahead to find out whether a place works that holds no jobs by itself: a node."""
        with self._database.write() as connection:
            connection.execute(update(pauses).where(_is(Scope.PLACE, place, Cause.FAULT)).values(probe=job_id))

    def probe_ended(self, job_id: str) -> None:
        """Send another job ahead: this one ended before it could tell whether a place works."""
        with self._database.write() as connection:
            connection.execute(update(pauses).where(pauses.c.probe == job_id).values(probe=None))


def read_pauses(connection: Connection) -> tuple[Pause, ...]:
    """Return all pauses, oldest first."""
    return tuple(_pause_of(row) for row in connection.execute(select(pauses).order_by(pauses.c.since)))


def keep_pauses(connection: Connection) -> None:
    """Keep pauses from being ended until the transaction does: one that is over must mark no job.

    Comes before the locks of jobs: what ends a pause locks jobs after it.
    """
    connection.execute(select(pauses.c.scope).with_for_update(read=True, key_share=True)).all()


def pauses_to_try(connection: Connection, now: float) -> tuple[Pause, ...]:
    """Return the pauses of places that a job may be sent ahead to try; no other claim does until the transaction ends.

    A job that was sent ahead and is not at work any more, as its driver was lost or it was given back, tells nothing.
    """
    query = select(pauses).where(pauses.c.cause == Cause.FAULT).order_by(pauses.c.since)
    found = [_pause_of(row) for row in connection.execute(query.with_for_update(key_share=True, skip_locked=True))]
    sent = {pause.probe for pause in found} - {None}
    # A statement of its own, after the lock: it sees what the claims did that held it before.
    active = select(jobs.c.id).where(jobs.c.id.in_(sent), jobs.c.state.in_(ACTIVE_STATES))
    at_work = set(connection.scalars(active)) if sent else set()
    if lost := sent - at_work:
        connection.execute(update(pauses).where(pauses.c.probe.in_(lost)).values(probe=None))
    return tuple(each for each in found if each.probe not in at_work and (each.probe_at or 0.0) <= now)


def check_scope(scope: Scope, name: str) -> None:
    """Check that a pause names what it is of.

    Raises:
        BadInputError: the queue has a name, or something else has none.
    """
    if (scope is Scope.QUEUE) is bool(name):
        raise BadInputError(f"expected {'no name after queue' if name else f'the name of a {scope}'}, found {name!r}")


def _pause_of(row: Row[*tuple[object, ...]]) -> Pause:
    values = row._asdict()
    failure, state = values.pop("failure_class"), values.pop("state")
    return Pause(
        **values | {"scope": Scope(row.scope), "cause": Cause(row.cause)},
        failure_class=None if failure is None else FailureClass(failure),
        state=None if state is None else JobState(state),
    )


def _is(scope: Scope, name: str, cause: Cause) -> ColumnElement[bool]:
    return and_(pauses.c.scope == scope, pauses.c.name == name, pauses.c.cause == cause)


def _is_paused(connection: Connection, scope: Scope, name: str) -> bool:
    where = and_(pauses.c.scope == scope, pauses.c.name == name)
    return connection.execute(select(pauses.c.scope).where(where)).first() is not None


def _tell(connection: Connection, kind: MessageKind, some: Iterable[Pause], now: float) -> None:
    """Tell those who have asked for it of places that rest, or work again."""
    messages = [
        Message(
            kind=kind,
            data={
                "place": each.name,
                "cause": each.cause.value,
                "since": each.since,
                "by": each.by,
                "reason": each.reason,
                "failure": each.failure_class,
            },
        )
        for each in some
        if each.scope is Scope.PLACE
    ]
    tell(connection, messages, now)
