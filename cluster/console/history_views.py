"""What happened to jobs, for a person and for a program."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from cluster.console.display import cell, duration, line
from cluster.console.documents import event_document, plain
from cluster.console.history import History, NextStep
from cluster.console.queue_views import state_style
from jobs.ledger.records import Event, JobRecord
from jobs.text import MAX_MESSAGE, shown

_FIRST = ("reason", "failure", "place", "message", "attempt", "worker", "node", "log")
"""What a person looks for first in the detail of an event."""
_LAST_SECONDS = 10.0
_LEAST_SECONDS = 0.05


def history_document(history: History) -> dict[str, Any]:
    """Return what `status` says of one job beside the job itself."""
    return {
        "events": [event_document(event) | {"seconds": seconds} for event, seconds in history.steps],
        "seconds_to_publish": history.seconds_to_publish,
        "next": plain(history.next_step),
    }


def history_table(histories: Sequence[History]) -> Table:
    """Return one row for each step in the life of jobs: when, into what state, how long in it, and what is known."""
    table = Table(box=None, pad_edge=False)
    for name in ("job", "at (UTC)", "state", "for", "detail"):
        table.add_column(name, overflow="fold", justify="right" if name == "for" else "left")
    for history in histories:
        for event, seconds in history.steps:
            table.add_row(
                cell(event.job_id),
                _time(event.at),
                Text(event.state.value, state_style(event.state)),
                "" if seconds is None else span(seconds),
                Text(shown(detail_words(event), MAX_MESSAGE)),
            )
    return table


def next_line(record: JobRecord, history: History) -> Text:
    """Return how long a job took, and what comes next, in one line."""
    took = history.seconds_to_publish
    if took is not None:
        return line(f"{record.id}: published {span(took)} after it was submitted", "green")
    step = history.next_step
    style = "red" if step.kind == "person" else "yellow" if step.kind in {"held", "again"} else ""
    return line(f"{record.id}: next: {_when(step)}{step.text}", style)


def detail_words(event: Event) -> str:
    """Return what is known of an event."""
    detail = {name: value for name, value in event.detail.items() if value not in (None, False)}
    unit = detail.pop("unit", None)
    if "worker" in detail:
        detail.pop("owner", None)  # the line above has it
    names = [*(name for name in _FIRST if name in detail), *(name for name in detail if name not in _FIRST)]
    parts = [f"{name}: {_value_words(detail[name])}" for name in names]
    if isinstance(unit, Mapping):
        parts.append(_unit_words(unit))
    return ", ".join(parts)


def _value_words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else "yes" if value is True else str(value)


def span(seconds: float) -> str:
    """Return seconds, with a decimal where there are few."""
    return f"{seconds:.1f} s" if seconds < _LAST_SECONDS else duration(seconds)


def _unit_words(unit: Mapping[str, Any]) -> str:
    sizes = [f"{unit[f'bytes_{what}']}" for what in ("read", "written", "uploaded")]
    read, written, uploaded = (decimal(int(size)) for size in sizes)
    told = {stage: seconds for stage, seconds in unit["seconds"].items() if seconds >= _LEAST_SECONDS}
    stages = ", ".join(f"{stage} {span(seconds)}" for stage, seconds in told.items())
    jobs = f"{unit['jobs']} job{'' if unit['jobs'] == 1 else 's'}"
    return f"its pass ({jobs}): read {read}, wrote {written}, sent {uploaded}; {stages}"


def _when(step: NextStep) -> str:
    return "" if step.at is None else f"at {_time(step.at)}: "


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"
