"""Following a batch, from any terminal that can reach the queue."""

import contextlib
import logging
import time

from rich.console import RenderableType
from rich.live import Live

from cluster.console.display import board
from cluster.console.documents import plain, progress_document
from cluster.console.progress import ByteClock, by_base
from cluster.console.queue_views import failure_table, pause_line, state_counts
from cluster.console.terminal import Terminal
from cluster.front.service import Service
from jobs.errors import FailureClass, MergefleetError
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore

logger = logging.getLogger(__name__)

_MAX_ASKING = 20.0
"""A long ledger is asked so seldom that this many times as long passes between two answers as one takes."""


def watch_jobs(
    output: Terminal, service: Service, selection: Selection, poll_seconds: float
) -> tuple[FailureClass, ...]:
    """Show how far jobs are until all of them are final.

    Args:
        output: a live board for a person, or a JSON line whenever something has changed.
        service: the queue.
        selection: which jobs.
        poll_seconds: how often the ledger is asked; less often where its answers take long.

    Returns:
        The classes of those among them that failed.

    Raises:
        KeyboardInterrupt: as it came.
    """
    clock, last = ByteClock(), None
    live = Live(console=output.out, refresh_per_second=1, transient=True)
    with contextlib.nullcontext() if output.as_json else live:  # a live display hides the cursor, even an empty one
        while True:
            begin = time.monotonic()
            progress, pauses = by_base(service.work(selection)), service.pauses()
            document = progress_document(progress, clock.seconds_left(begin, progress), pauses)
            shown = {name: value for name, value in document.items() if name != "seconds_left"}
            if shown != last:
                output.document(document)
                last = shown
            if not output.as_json:
                live.update(board(progress, document["seconds_left"], [pause_line(each) for each in pauses]))
            if all(each.num_final == each.num_jobs for each in progress):
                break
            time.sleep(max(poll_seconds, (time.monotonic() - begin) * _MAX_ASKING))
    failures = service.failures(selection)
    counts = service.counts(selection)
    if failures:
        output.show(failure_table(failures))
    output.show(state_counts(counts))
    output.document(
        {
            "event": "done",
            "counts": {state.value: count for state, count in counts.items() if count},
            "failures": [plain(each) for each in failures],
        }
    )
    return tuple(each.failure_class for each in failures)


class LiveBoard:
    """The board of what is not final yet, asked for anew when it is drawn, in any thread; rarely if that takes long."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._selection = Selection(unfinished_at=store.now())
        self._clock = ByteClock()
        self._last: RenderableType = ""
        self._ask_at = 0.0
        self._failed = False

    def __rich__(self) -> RenderableType:
        begin = time.monotonic()
        if begin < self._ask_at:
            return self._last
        try:
            progress = by_base(self._store.work(self._selection))
            pauses = [pause_line(each) for each in self._store.pauses()]
            self._last = board(progress, self._clock.seconds_left(begin, progress), pauses)
        except MergefleetError:
            pass  # the store does not answer for a moment; the driver says so
        except Exception:
            # The display's edge: what cannot be drawn is no matter of the driver's, which draws it.
            if not self._failed:
                logger.exception("the board cannot be drawn")
            self._failed = True
        now = time.monotonic()
        self._ask_at = now + (now - begin) * _MAX_ASKING
        return self._last
