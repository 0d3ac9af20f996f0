"""The `report` command: a batch as one HTML page."""

import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cluster.console.batch_report import BatchFacts, render_batch
from cluster.console.sweep_ranking import rank_sweeps
from cluster.front.reports import read_report
from jobs.errors import BadInputError, NotFoundError
from jobs.ledger.pauses import Scope
from jobs.ledger.records import Event, JobRecord
from jobs.ledger.selection import Selection
from jobs.parity_report import ParityReport

if TYPE_CHECKING:
    from jobs.ledger.store import JobStore

_HUB = "https://huggingface.co"


def write_report(store: "JobStore", selection: Selection, batch: str, to: Path, reports: Path) -> tuple[Path, int]:
    """Write the page of a batch; it appears whole, in the place of an older one.

    Args:
        store: the ledger.
        selection: the jobs of the batch.
        batch: its name.
        to: the file.
        reports: the directory of the parity reports.

    Returns:
        Where it is, and how many jobs it shows.

    Raises:
        BadInputError: the file cannot be written.
    """
    records = store.jobs(selection)
    events: dict[str, list[Event]] = defaultdict(list)
    for event in store.events_of(selection):
        events[event.job_id].append(event)
    page = render_batch(
        BatchFacts(
            name=batch,
            jobs=records,
            events=events,
            paused={pause.name: pause.reason for pause in store.pauses() if pause.scope is Scope.PLACE},
            now=store.now(),
            hub=os.environ.get("HF_ENDPOINT") or _HUB,
            rankings=rank_sweeps(records, lambda record: _report_of(record, reports)),
        )
    )
    path = to.absolute()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        message = f"--to: cannot write {path}: {error.strerror}; name a file in a directory that is there"
        raise BadInputError(message) from error
    return path, len(records)


def _report_of(record: JobRecord, reports: Path) -> ParityReport | None:
    """Return the parity report of a job; None where it has none here, or one that cannot be read."""
    try:
        return ParityReport.model_validate_json(read_report(record, reports, page=False))
    except (NotFoundError, ValidationError):
        return None
