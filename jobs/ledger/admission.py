"""How jobs enter the ledger: one content for each id, one live job for each destination, all conflicts at once.

No destination lies inside of another live or published one: a release holds what its manifest names, and nothing else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from jobs.errors import BadInputError
from jobs.ledger.database import insert_many, rows_where_in
from jobs.ledger.journal import Step, event_values
from jobs.ledger.options import LABEL_OPTION, read_option
from jobs.ledger.records import SubmitResult
from jobs.ledger.rows import request_of
from jobs.ledger.schema import batches, events, jobs, labels
from jobs.locations import enclosing
from jobs.request import BaseQuantization, MergeRequest
from jobs.states import LIVE_STATES, JobState


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request with the texts the ledger keeps of it: made before drivers have to wait for the lock."""

    request: MergeRequest
    text: str
    """The request as JSON."""
    destination: str


def candidate_of(request: MergeRequest) -> Candidate:
    """Return a request as it can be admitted."""
    return Candidate(request, request.model_dump_json(by_alias=True), str(request.destination))


def admit(connection: Connection, candidates: Sequence[Candidate], batch: str, now: float) -> SubmitResult:
    """Insert the jobs that are new.

    Args:
        connection: in a transaction under the admission lock.
        candidates: to become jobs; one that is a job already changes nothing.
        batch: that the new jobs join; made when it is missing.
        now: time of the submission, seconds.

    Raises:
        BadInputError: an id has other content, or a destination belongs to another job; lists all such conflicts.
    """
    query = select(jobs.c.id, jobs.c.request)
    stored = {
        row.id: row for row in rows_where_in(connection, query, jobs.c.id, (each.request.id for each in candidates))
    }
    new: dict[str, Candidate] = {}
    unchanged: dict[str, None] = {}
    conflicts = []
    for each in candidates:
        job_id = each.request.id
        if (row := stored.get(job_id)) is not None:
            # Text is compared first: reading very many requests takes seconds.
            if row.request == each.text or _is_same(known := request_of(row), each.request):
                unchanged[job_id] = None
            else:
                conflicts.append(_difference(known, each.request))
        elif not _is_same((earlier := new.setdefault(job_id, each)).request, each.request):
            conflicts.append(_difference(earlier.request, each.request))
    conflicts += destination_conflicts(connection, ((job_id, each.destination) for job_id, each in new.items()))
    if conflicts:
        raise BadInputError("\n".join(conflicts))
    _insert(connection, list(new.values()), batch, now)
    return SubmitResult(batch=batch, created=tuple(new), unchanged=tuple(unchanged))


def destination_conflicts(connection: Connection, claims: Iterable[tuple[str, str]]) -> list[str]:
    """Say which jobs may not go live, as another live job has their destination, or one inside or around it.

    Args:
        connection: in a transaction under the admission lock.
        claims: id and destination of each job that is to go live; checked against each other as well.

    Returns:
        One sentence for each conflict.
    """
    claimed = list(claims)
    if not claimed:
        return []
    # Read once and whole: no index of both databases finds paths that begin alike, and for many destinations SQLite
    # goes through all live jobs at each query anyway.
    query = select(jobs.c.destination, jobs.c.id).where(jobs.c.state.in_(LIVE_STATES))
    live = {row.destination: row.id for row in connection.execute(query)}
    owners = dict(live)
    mine: dict[str, str] = {}
    taken = []
    for job_id, destination in claimed:
        if (owner := owners.setdefault(destination, job_id)) != job_id:
            taken.append(
                f"job '{job_id}': expected a destination of its own, found {destination}, "
                f"which belongs to job '{owner}'"
            )
        mine[destination] = job_id
    inside = [
        f"job '{job_id}': expected a destination beside those of others, found {destination}, "
        f"which lies inside of {outer} of job '{owners[outer]}'"
        for destination, job_id in mine.items()
        for outer in enclosing(destination)
        if outer in owners
    ]
    around = [
        f"job '{mine[outer]}': expected a destination beside those of others, found {outer}, "
        f"inside of which lies {destination} of job '{owner}'"
        for destination, owner in live.items()
        for outer in enclosing(destination)
        if outer in mine
    ]
    return taken + inside + around


def _is_same(known: MergeRequest, request: MergeRequest) -> bool:
    """Return whether two requests ask for the same; earlier versions wrote down NF4 where a request did not say."""
    return known == request or known.settled(BaseQuantization.NF4) == request.settled(BaseQuantization.NF4)


def _difference(known: MergeRequest, request: MergeRequest) -> str:
    names = [name for name in type(request).model_fields if getattr(known, name) != getattr(request, name)]
    return (
        f"job '{request.id}': expected the same request as before under this id, "
        f"found another {', '.join(names)}; submit it under a new id"
    )


def _insert(connection: Connection, candidates: Sequence[Candidate], batch: str, now: float) -> None:
    if not candidates:
        return
    if connection.execute(select(batches.c.name).where(batches.c.name == batch)).first() is None:
        connection.execute(insert(batches).values(name=batch, created_at=now))
    label = read_option(connection, LABEL_OPTION)
    insert_many(
        connection,
        jobs,
        [
            {
                "id": each.request.id,
                "request": each.text,
                "batch": batch,
                "base": str(each.request.base),
                "destination": each.destination,
                "share": each.request.labels.get(label, ""),
                "priority": each.request.priority,
                "deadline": None if each.request.deadline is None else each.request.deadline.timestamp(),
                "state": JobState.QUEUED.value,
                "num_events": 1,
                "created_at": now,
                "updated_at": now,
            }
            for each in candidates
        ],
    )
    first = event_values("", 1, now, Step(JobState.QUEUED))
    insert_many(connection, events, [first | {"job_id": each.request.id} for each in candidates])
    rows = [
        {"job_id": each.request.id, "name": name, "value": value}
        for each in candidates
        for name, value in each.request.labels.items()
    ]
    insert_many(connection, labels, rows)
