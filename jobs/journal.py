"""State changes and their events: written here together, and nowhere else."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Connection, insert, update

from jobs.errors import InternalError
from jobs.records import JobRow
from jobs.schema import events, jobs
from jobs.states import TRANSITIONS, JobState


@dataclass(frozen=True, slots=True)
class Step:
    """A state to enter, and what there is to say about it."""

    state: JobState
    detail: Mapping[str, JsonValue] = field(default_factory=dict)


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
    state = JobState(row.state)
    for step in steps:
        if step.state not in TRANSITIONS[state]:
            raise InternalError(f"job '{row.id}': no way leads from {state} to {step.state}")
        state = step.state
    num_events = row.num_events + len(steps)
    values = {"state": state.value, "num_events": num_events, "updated_at": now, **columns}
    connection.execute(update(jobs).where(jobs.c.number == row.number).values(values))
    connection.execute(
        insert(events),
        [event_values(row.id, row.num_events + index, now, step) for index, step in enumerate(steps, start=1)],
    )


def event_values(job_id: str, sequence: int, now: float, step: Step) -> dict[str, Any]:
    """Return the row of the table of events for one step."""
    detail = json.dumps(dict(step.detail), sort_keys=True)
    return {"job_id": job_id, "sequence": sequence, "at": now, "state": step.state.value, "detail": detail}
