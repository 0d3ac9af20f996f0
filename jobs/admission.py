"""How jobs enter the ledger: one content for each id, one live job for each destination, all conflicts at once."""

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, insert, select

from jobs.database import rows_where_in
from jobs.errors import BadInputError
from jobs.journal import Step, event_values
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
    """Say which jobs may not go live, as another live job has their destination.

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
    return [
        f"job '{job_id}': expected a destination of its own, found {destination}, which belongs to job '{owner}'"
        for job_id, destination in claimed
        if (owner := owners.setdefault(destination, job_id)) != job_id
    ]


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
