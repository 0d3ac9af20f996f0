"""The `report` command: a batch as one HTML page."""

import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.console.batch_report import BatchFacts, render_batch
from jobs.errors import BadInputError
from jobs.ledger.pauses import Scope
from jobs.ledger.records import Event
from jobs.ledger.selection import Selection

if TYPE_CHECKING:
    from jobs.ledger.store import JobStore

_HUB = "https://huggingface.co"


def write_report(store: "JobStore", selection: Selection, batch: str, to: Path) -> tuple[Path, int]:
    """Write the page of a batch; it appears whole, in the place of an older one.

    Args:
        store: the ledger.
        selection: the jobs of the batch.
        batch: its name.
        to: the file.

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
