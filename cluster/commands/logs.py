"""The `logs` command: what driver and workers wrote about one job."""

import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.log_reading import LogReader
from cluster.console.log_views import log_line, missing_line, rotated_line
from cluster.console.terminal import Terminal
from cluster.log_files import driver_log
from jobs.ledger.records import Event
from jobs.ledger.selection import Selection
from jobs.states import FINAL_STATES

if TYPE_CHECKING:
    from jobs.ledger.store import JobStore

_SKEW_SECONDS = 60.0
"""By which the clocks of ledger and workers may differ."""


def show_logs(
    output: Terminal, store: "JobStore", directory: Path, job_id: str, *, follow_seconds: float | None
) -> None:
    """Show all lines about a job, and say which files of others' machines are not to be seen here.

    Args:
        output: gets a line for each; with JSON a document.
        store: the ledger, which knows who was at it.
        directory: of log files.
        job_id: of the job, which is there.
        follow_seconds: how often to look for more until the job is final; None for what is there now.

    Raises:
        KeyboardInterrupt: as it came.
    """
    reader, events = LogReader(directory, job_id), store.events(job_id)
    writers = _writers(events)
    while True:
        # Asked before the files are read: what a driver writes after it has settled a job, one more reading finds.
        (record,) = store.jobs(Selection(ids=[job_id]))
        events += store.events(job_id, after=len(events))
        writers |= _writers(events)
        for each in reader.read({owner for owner in map(_owner, events) if owner is not None}):
            if isinstance(each.get("log"), str):  # those who help with a pass are named by the driver alone
                writers[each["log"]] = each.get("node")
            output.document(each)
            output.show(log_line(each))
        if follow_seconds is None:
            break
        if record.state in FINAL_STATES:
            follow_seconds = None
        time.sleep(follow_seconds or 1.0)
    _tell_missing(output, reader, writers, events)


def _tell_missing(
    output: Terminal, reader: LogReader, writers: Mapping[str, str | None], events: Iterable[Event]
) -> None:
    """Say which files are not to be seen here, and of which the lines of that time are gone."""
    here, names = socket.gethostname(), reader.names()
    for name, node in writers.items():
        if name not in names:
            output.document({"missing": name, "node": node})
            output.show(missing_line(node, name, is_here=node == here))
    begun = {str(event.detail["log"]): event.at for event in reversed(tuple(events)) if event.detail.get("log")}
    for name, at in begun.items():
        begins = reader.begins.get(name, at)
        if name in names and begins - at > _SKEW_SECONDS:
            output.document({"missing": name, "node": writers[name], "before": begins})
            output.show(rotated_line(name, begins))


def _writers(events: Iterable[Event]) -> dict[str, str | None]:
    """Return the log files of a job, each with its machine."""
    found: dict[str, str | None] = {}
    for event in events:
        owner, log = _owner(event), event.detail.get("log")
        if owner is not None:
            found[driver_log(owner)] = owner.rsplit("-", 2)[0]  # the name of a driver begins with its machine's
        if log is not None:
            found[str(log)] = _text(event.detail.get("node"))
    return found


def _owner(event: Event) -> str | None:
    return _text(event.detail.get("owner"))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
