"""How jobs enter the ledger: one content for each id, one live job for each destination, all conflicts at once.

No destination lies inside of another live or published one: a release holds what its manifest names, and nothing else.
"""

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, insert, select

from jobs.database import rows_where_in
from jobs.errors import BadInputError
from jobs.journal import Step, event_values
from jobs.locations import enclosing
from jobs.records import SubmitResult, request_of
from jobs.request import MergeRequest
from jobs.schema import events, jobs, labels
from jobs.states import LIVE_STATES, JobState


def admit(connection: Connection, requests: Sequence[MergeRequest], now: float) -> SubmitResult:
    """Insert the jobs that are new.

    Args:
        connection: in a transaction under the admission lock.
        requests: to become jobs; one that is a job already changes nothing.
        now: time of the submission, seconds.

    Raises:
        BadInputError: an id has other content, or a destination belongs to another job; lists all such conflicts.
    """
    stored = {
        row.id: request_of(row)
        for row in rows_where_in(connection, select(jobs), jobs.c.id, (request.id for request in requests))
    }
    new: dict[str, MergeRequest] = {}
    unchanged: dict[str, None] = {}
    conflicts = []
    for request in requests:
        known = stored.get(request.id) or new.get(request.id)
        if known is None:
            new[request.id] = request
        elif known != request:
            conflicts.append(_difference(known, request))
        elif request.id in stored:
            unchanged[request.id] = None
    conflicts += destination_conflicts(connection, ((request.id, str(request.destination)) for request in new.values()))
    if conflicts:
        raise BadInputError("\n".join(conflicts))
    _insert(connection, list(new.values()), now)
    return SubmitResult(created=tuple(new), unchanged=tuple(unchanged))


def destination_conflicts(connection: Connection, claims: Iterable[tuple[str, str]]) -> list[str]:
    """Say which jobs may not go live, as another live job has their destination, or one inside or around it.

    Args:
        connection: in a transaction under the admission lock.
        claims: id and destination of each job that is to go live; checked against each other as well.

    Returns:
        One sentence for each conflict.
    """
    claimed = list(claims)
    live = select(jobs).where(jobs.c.state.in_(LIVE_STATES))
    rows = rows_where_in(connection, live, jobs.c.destination, (destination for _, destination in claimed))
    owners = {row.destination: row.id for row in rows}
    taken = [
        f"job '{job_id}': expected a destination of its own, found {destination}, which belongs to job '{owner}'"
        for job_id, destination in claimed
        if (owner := owners.setdefault(destination, job_id)) != job_id
    ]
    return taken + _nesting_conflicts(connection, claimed)


def _nesting_conflicts(connection: Connection, claimed: Sequence[tuple[str, str]]) -> list[str]:
    """Say which destinations lie inside of another job's, or around one: releases do not hold releases.

    All live destinations are read: no index finds what begins alike in both databases.
    """
    claims = {destination: job_id for job_id, destination in claimed if not destination.startswith("hf://")}
    if not claims:
        return []
    query = select(jobs.c.id, jobs.c.destination).where(
        jobs.c.state.in_(LIVE_STATES), jobs.c.destination.not_like("hf://%")
    )
    live = {row.destination: row.id for row in connection.execute(query)}
    owners = live | claims
    inside = [
        f"job '{job_id}': expected a destination beside those of others, found {destination}, "
        f"which lies inside of {outer} of job '{owners[outer]}'"
        for destination, job_id in claims.items()
        for outer in enclosing(destination)
        if outer in owners
    ]
    around = [
        f"job '{claims[outer]}': expected a destination beside those of others, found {outer}, "
        f"inside of which lies {destination} of job '{owner}'"
        for destination, owner in live.items()
        for outer in enclosing(destination)
        if outer in claims
    ]
    return inside + around


def _difference(known: MergeRequest, request: MergeRequest) -> str:
    names = [name for name in type(request).model_fields if getattr(known, name) != getattr(request, name)]
    return (
        f"job '{request.id}': expected the same request as before under this id, "
        f"found another {', '.join(names)}; submit it under a new id"
    )


def _insert(connection: Connection, requests: Sequence[MergeRequest], now: float) -> None:
    if not requests:
        return
    connection.execute(
        insert(jobs),
        [
            {
                "id": request.id,
                "request": request.model_dump_json(by_alias=True),
                "destination": str(request.destination),
                "priority": request.priority,
                "state": JobState.QUEUED.value,
                "num_events": 1,
                "created_at": now,
                "updated_at": now,
            }
            for request in requests
        ],
    )
    connection.execute(
        insert(events), [event_values(request.id, 1, now, Step(JobState.QUEUED)) for request in requests]
    )
    rows = [
        {"job_id": request.id, "name": name, "value": value}
        for request in requests
        for name, value in request.labels.items()
    ]
    if rows:
        connection.execute(insert(labels), rows)
