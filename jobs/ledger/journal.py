"""State changes and their events: written here together, and nowhere else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Connection, bindparam, insert, literal, select, update

from jobs.errors import InternalError
from jobs.ledger.database import in_pieces
from jobs.ledger.deliveries import JOB_MESSAGES, job_message, tell
from jobs.ledger.rows import JobRow
from jobs.ledger.schema import events, jobs
from jobs.states import TRANSITIONS, JobState

_TOLD = (jobs.c.id, jobs.c.batch, jobs.c.base, jobs.c.destination, jobs.c.num_events)
"""What messages tell of a job."""


@dataclass(frozen=True, slots=True)
class Step:
    """A state to enter, and what there is to say about it."""

    state: JobState
    detail: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Move:
    """One job's way through states."""

    row: JobRow
    """The job as it stands."""
    steps: Sequence[Step]
    """The states to enter, in order."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the job to set."""


def take_steps(connection: Connection, row: JobRow, now: float, *steps: Step, **columns: Any) -> None:
    """Move one job through states, and log each.

    Args:
        connection: in a transaction that holds the row's lock.
        row: the job as it stands.
        now: time of the steps, seconds.
        steps: the states to enter, in order.
        columns: other columns of the job to set.

    Raises:
        InternalError: a step is no allowed transition.
    """
    make_moves(connection, [Move(row, steps, columns)], now)


def make_moves(connection: Connection, moves: Sequence[Move], now: float) -> None:
    """Move jobs through states, and log each.

    Args:
        connection: in a transaction that holds the locks of the rows.
        moves: at least one step each; all set the same columns.
        now: time of the steps, seconds.

    Raises:
        InternalError: a step is no allowed transition.
    """
    if not moves:
        return
    changes, entries, messages = [], [], []
    for move in moves:
        state = JobState(move.row.state)
        for index, step in enumerate(move.steps, start=1):
            if step.state not in TRANSITIONS[state]:
                raise InternalError(f"job '{move.row.id}': no way leads from {state} to {step.state}")
            state = step.state
            sequence = move.row.num_events + index
            entries.append(event_values(move.row.id, sequence, now, step))
            if state in JOB_MESSAGES:
                messages.append(job_message(move.row, sequence, state, step.detail))
        num_events = move.row.num_events + len(move.steps)
        columns = {"state": state.value, "num_events": num_events, "updated_at": now, **move.columns}
        changes.append({"in_row": move.row.number, **columns})
    connection.execute(update(jobs).where(jobs.c.number == bindparam("in_row")), changes)
    connection.execute(insert(events), entries)
    tell(connection, messages, now)


def step_many(
    connection: Connection, numbers: Sequence[int], source: JobState, step: Step, now: float, **columns: Any
) -> None:
    """Move very many jobs that are in one state on to another, and log each, in few statements.

    Args:
        connection: in a transaction that holds the locks of the rows.
        numbers: of the jobs.
        source: the state they are in.
        step: the state to enter.
        now: time of the step, seconds.
        columns: other columns of the jobs to set.

    Raises:
        InternalError: the step is no allowed transition.
    """
    if step.state not in TRANSITIONS[source]:
        raise InternalError(f"no way leads from {source} to {step.state}")
    entry = event_values("", 0, now, step)
    for some in in_pieces(numbers):
        where = jobs.c.number.in_(some)
        logged = select(
            jobs.c.id,
            jobs.c.num_events + 1,
            literal(now, events.c.at.type),
            literal(entry["state"], events.c.state.type),
            literal(entry["detail"], events.c.detail.type),
        ).where(where)
        connection.execute(insert(events).from_select(["job_id", "sequence", "at", "state", "detail"], logged))
        changed = {"state": step.state.value, "num_events": jobs.c.num_events + 1, "updated_at": now, **columns}
        connection.execute(update(jobs).where(where).values(changed))
        if step.state in JOB_MESSAGES:
            entered = connection.execute(select(*_TOLD).where(where).order_by(jobs.c.number)).all()
            tell(connection, [job_message(row, row.num_events, step.state, step.detail) for row in entered], now)


def event_values(job_id: str, sequence: int, now: float, step: Step) -> dict[str, Any]:
    """Return the row of the table of events for one step."""
    detail = json.dumps(dict(step.detail), sort_keys=True)
    return {"job_id": job_id, "sequence": sequence, "at": now, "state": step.state.value, "detail": detail}
