"""Following a batch, from any terminal that can reach the store."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection

from rich.console import RenderableType
from rich.live import Live

from cluster.console.display import board, job_table, state_counts
from cluster.console.documents import progress_document
from cluster.console.progress import Batch, ByteClock, by_base
from cluster.console.terminal import Terminal
from jobs.errors import FailureClass, MergefleetError
from jobs.ledger.records import JobRecord
from jobs.ledger.store import JobStore
from jobs.states import FINAL_STATES, JobState

logger = logging.getLogger(__name__)

_UNSUCCESSFUL = frozenset({JobState.FAILED, JobState.QUARANTINED})


def watch_batch(output: Terminal, store: JobStore, poll_seconds: float) -> tuple[FailureClass, ...]:
    """Show how far the batch is until all its jobs are final.

    Args:
        output: a live board for a person, or a JSON line whenever something has changed.
        store: the ledger.
        poll_seconds: how often it is asked.

    Returns:
        The failures of jobs that failed while they were watched.

    Raises:
        KeyboardInterrupt: as it came.
    """
    batch, clock, last = Batch(store), ByteClock(), None
    live = Live(console=output.out, refresh_per_second=4, transient=True)
    with contextlib.nullcontext() if output.as_json else live:  # a live display hides the cursor, even an empty one
        while True:
            records = batch.refresh()
            progress = by_base(records)
            document = progress_document(progress, clock.seconds_left(time.monotonic(), progress))
            if document["bases"] != last:
                output.document(document)
                last = document["bases"]
            if not output.as_json:
                live.update(board(progress, document["seconds_left"]))
            if all(record.state in FINAL_STATES for record in records):
                break
            time.sleep(poll_seconds)
    failed = _unsuccessful(records)
    if failed:
        output.show(job_table(failed))
    counts = Counter(record.state for record in records)
    output.show(state_counts(counts))
    output.document({"event": "done", "counts": {state.value: count for state, count in counts.items()}})
    return tuple(record.failure_class for record in failed if record.failure_class is not None)


def _unsuccessful(records: Collection[JobRecord]) -> list[JobRecord]:
    return [record for record in records if record.state in _UNSUCCESSFUL]


class LiveBoard:
    """The board of a batch, asked for anew each time it is drawn, in any thread."""

    def __init__(self, store: JobStore) -> None:
        self._batch = Batch(store)
        self._clock = ByteClock()
        self._last: RenderableType = ""
        self._failed = False

    def __rich__(self) -> RenderableType:
        try:
            progress = by_base(self._batch.refresh())
            self._last = board(progress, self._clock.seconds_left(time.monotonic(), progress))
        except MergefleetError:
            pass  # the store does not answer for a moment; the driver says so
        except Exception:
            # The display's edge: what cannot be drawn is no matter of the driver's, which draws it.
            if not self._failed:
                logger.exception("the board cannot be drawn")
            self._failed = True
        return self._last
