"""Claims: which jobs a driver gets next. Shares in turn; inside of a share by priority, then by age.

What is paused is passed over: jobs that a pause covers are marked when it begins, and here at the latest, so that an
index leads past them. All times are the database's.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Connection, and_, bindparam, func, or_, select, update

from jobs.errors import FailureClass
from jobs.ledger.database import in_pieces, put
from jobs.ledger.journal import Move, Step, make_moves
from jobs.ledger.options import CLOCK_OPTION, set_option
from jobs.ledger.pauses import Cause, Pause, Scope, pauses_to_try, read_pauses
from jobs.ledger.records import Lease
from jobs.ledger.rows import JobRow, lease_of, request_of
from jobs.ledger.schema import jobs, options, pauses, shares
from jobs.ledger.shares import ShareRules, Turns
from jobs.request import MergeRequest
from jobs.states import ACTIVE_STATES, CLAIMABLE_STATES, JobState

_PAGE = 64
"""Jobs of one share that are read at a time, at least, once some were found to be paused."""

_MAX_MARKED = 5000
"""Jobs that are found to be paused, and marked, after which one claim leaves the others to the next."""

_MAX_LOOKED_AT = 500
"""Jobs that are looked at in one claim to find the one that tries a place."""


class Claim:
    """One claim, in a transaction that may write."""

    def __init__(self, connection: Connection, now: float, owner: str, limit: int, rules: ShareRules) -> None:
        """Take what decides.

        Args:
            connection: in a transaction that may write.
            now: time of the claim, seconds.
            owner: names the driver.
            limit: most jobs to lease.
            rules: weights and quotas of shares.
        """
        self._connection = connection
        self._now = now
        self._owner = owner
        self._limit = limit
        self._rules = rules
        self._pauses = read_pauses(connection)
        self._held: dict[int, str] = {}
        """By number of the job, the pause that keeps it back: what is still to be marked."""
        self._num_marked = 0
        self._tries: dict[int, list[JsonValue]] = {}
        """By number of the job, the places that it is sent ahead to try."""

    def lease(self, expires_at: float) -> tuple[Lease, ...]:
        """Lease jobs that wait for nothing.

        Args:
            expires_at: when the leases end, seconds.
        """
        if any(pause.scope is Scope.QUEUE for pause in self._pauses):
            return ()
        leases, moves = [], []
        probes = list(self._probes())
        taken = self._in_turn(probes)
        for row, request, is_probe in (*((*each, True) for each in probes), *((*each, False) for each in taken)):
            lease = dataclasses.replace(lease_of(row, request, row.token + 1), is_probe=is_probe)
            columns = {
                "owner": self._owner,
                "token": lease.token,
                "lease_expires_at": expires_at,
                "not_before": None,
                "held_by": "",
                "stage": None,
                "bytes_done": 0,
                "bytes_total": 0,
            }
            detail: dict[str, JsonValue] = {"owner": self._owner, "token": lease.token}
            if row.number in self._tries:
                detail["tries"] = self._tries[row.number]
            moves.append(Move(row, [Step(JobState.LEASED, detail)], columns))
            leases.append(lease)
        make_moves(self._connection, moves, self._now)
        self._mark_held()
        return tuple(leases)

    def _in_turn(self, probes: Sequence[tuple[JobRow, MergeRequest]]) -> list[tuple[JobRow, MergeRequest]]:
        """Take jobs from all shares in turn, beside those that try places."""
        names = set(self._waiting_shares())
        turns = self._turns(names)
        for row, _ in probes:
            turns.at_work[row.share] = turns.at_work.get(row.share, 0) + 1
        taken = turns.take({name: self._jobs_of(name) for name in names}, self._limit)
        self._keep(turns)
        return taken

    def _jobs_of(self, share: str) -> Iterator[tuple[JobRow, MergeRequest]]:
        """Yield the jobs of one share that may be claimed: by priority, then by age."""
        turn = (jobs.c.priority.desc(), jobs.c.number)
        size = self._limit  # no more: what is read is locked
        seen: set[int] = set()
        while True:
            rows: list[JobRow] = []
            # Each state by itself, in the order of an index: together, databases would look at every job that waits.
            for state in CLAIMABLE_STATES:
                where = and_(jobs.c.state == state, jobs.c.held_by == "", jobs.c.share == share)
                query = select(jobs).where(where).order_by(*turn).limit(size).with_for_update(skip_locked=True)
                rows += self._connection.execute(query.where(self._is_due) if state is JobState.RETRY_WAIT else query)
            rows = [row for row in rows if row.number not in seen]
            if not rows:
                return
            num_held = 0
            for row in sorted(rows, key=lambda row: (-row.priority, row.number)):
                seen.add(row.number)
                request = request_of(row)
                pause = next((each for each in self._pauses if each.covers(request, row.batch)), None)
                if pause is None:
                    yield row, request
                else:
                    self._held[row.number] = pause.key
                    num_held += 1
            self._num_marked += num_held
            if num_held == 0 or self._num_marked >= _MAX_MARKED:
                return  # as many as may be claimed at once were there, or it has taken long enough
            self._mark_held()
            size = max(self._limit, _PAGE)

    @property
    def _is_due(self) -> ColumnElement[bool]:
        return or_(jobs.c.not_before.is_(None), jobs.c.not_before <= self._now)

    def _mark_held(self) -> None:
        if self._held:
            rows = [{"in_row": number, "its_pause": key} for number, key in self._held.items()]
            query = update(jobs).where(jobs.c.number == bindparam("in_row"), jobs.c.owner.is_(None))
            self._connection.execute(query.values(held_by=bindparam("its_pause")), rows)
            self._held.clear()

    def _waiting_shares(self) -> Iterator[str]:
        """Yield the shares that have jobs which wait, found along an index: one look for each share."""
        for state in CLAIMABLE_STATES:
            last: str | None = None
            while True:
                query = select(func.min(jobs.c.share)).where(jobs.c.state == state, jobs.c.held_by == "")
                last = self._connection.scalar(query if last is None else query.where(jobs.c.share > last))
                if last is None:
                    break
                yield last

    def _turns(self, names: set[str]) -> Turns[tuple[JobRow, MergeRequest]]:
        virtual_times: dict[str, float] = {}
        at_work: dict[str, int] = {}
        clock: str | None = None
        if self._rules.label:
            # Locked: drivers that claim at one time would give the same turn twice.
            query = select(options.c.value).where(options.c.name == CLOCK_OPTION).with_for_update()
            clock = self._connection.scalar(query)
            for some in in_pieces(names):
                found = self._connection.execute(select(shares).where(shares.c.name.in_(some)))
                virtual_times |= {row.name: row.virtual_time for row in found}
        if self._rules.quotas:
            count = select(jobs.c.share, func.count()).where(jobs.c.state.in_(ACTIVE_STATES)).group_by(jobs.c.share)
            at_work = {row[0]: row[1] for row in self._connection.execute(count)}
        return Turns(self._rules, virtual_times, float(clock or 0), at_work)

    def _keep(self, turns: Turns[tuple[JobRow, MergeRequest]]) -> None:
        if not self._rules.label or not turns.changed:
            return
        for name in sorted(turns.changed):
            put(self._connection, shares, {"name": name}, {"virtual_time": turns.virtual_times[name]})
        set_option(self._connection, CLOCK_OPTION, repr(turns.clock))

    def _probes(self) -> Iterator[tuple[JobRow, MergeRequest]]:
        """Yield a job for each place that may work again: the next that only such places keep back."""
        due = pauses_to_try(self._connection, self._now) if self._pauses else ()
        keys = {pause.key for pause in due}
        lasting = [pause for pause in self._pauses if pause.cause is not Cause.FAULT or pause.key not in keys]
        tried: set[str] = set()
        for pause in due:
            if pause.key in tried:
                continue
            others = [*lasting, *(each for each in due if each.key in tried)]
            if (found := self._first_held(pause, others)) is None:
                continue
            for each in due:
                if each.covers(found[1], found[0].batch):
                    tried.add(each.key)
                    self._tries.setdefault(found[0].number, []).append(each.name)
                    where = and_(pauses.c.scope == each.scope, pauses.c.name == each.name)
                    probed = update(pauses).where(where, pauses.c.cause == Cause.FAULT)
                    self._connection.execute(probed.values(probe=found[0].id))
            yield found

    def _first_held(self, pause: Pause, others: Sequence[Pause]) -> tuple[JobRow, MergeRequest] | None:
        """Return the job that is to try a place; jobs that others keep back as well are held by those from now on."""
        if any(each.key == pause.key for each in others):
            return None
        where = and_(jobs.c.state.in_(CLAIMABLE_STATES), jobs.c.held_by == pause.key, self._is_due)
        # Least often failed first: a job that fails by itself must not be what the place is judged by.
        order = (jobs.c.excused_faults, jobs.c.priority.desc(), jobs.c.number)
        query = select(jobs).where(where).order_by(*order).limit(_MAX_LOOKED_AT)
        for row in self._connection.execute(query.with_for_update(skip_locked=True)).all():
            request = request_of(row)
            other = next((each for each in others if each.covers(request, row.batch)), None)
            if other is None:
                return row, request
            self._held[row.number] = other.key
        return None


def fail_overdue(connection: Connection, now: float) -> tuple[str, ...]:
    """Fail the jobs that wait still although their deadline has passed; return their ids."""
    # What was approved did begin.
    where = and_(jobs.c.deadline <= now, jobs.c.state.in_(CLAIMABLE_STATES), jobs.c.approved_by.is_(None))
    rows = connection.execute(select(jobs).where(where).order_by(jobs.c.number).with_for_update(skip_locked=True)).all()
    message = "its deadline passed before work on it began; submit it again with a later one"
    failure = FailureClass.DEADLINE_PASSED.value
    step = Step(JobState.FAILED, {"failure": failure, "message": message})
    columns = {"failure_class": failure, "failure_message": message, "not_before": None, "held_by": ""}
    make_moves(connection, [Move(row, [step], columns) for row in rows], now)
    return tuple(row.id for row in rows)
