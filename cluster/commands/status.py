"""The `status` command: an overview of the queue, a page of jobs, or one job with all that happened to it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.console.documents import batch_document, job_document, plain
from cluster.console.history import History, Surroundings, history_of
from cluster.console.history_views import history_document, history_table, next_line
from cluster.console.queue_views import (
    batch_table,
    driver_table,
    failure_table,
    job_table,
    pause_line,
    state_counts,
)
from cluster.console.terminal import Terminal
from jobs.errors import BadInputError
from jobs.ledger.queries import Order
from jobs.ledger.records import JobRecord
from jobs.ledger.selection import Selection

if TYPE_CHECKING:
    from cluster.front.service import Service


def show_overview(output: Terminal, service: "Service", *, limit: int, order: Order) -> None:
    """Show batches, drivers, what is paused, what failed why, and the jobs that are not final.

    Args:
        output: gets it.
        service: the queue.
        limit: most jobs shown.
        order: of the jobs.
    """
    counts, batches, pauses, drivers = service.counts(), service.batches(), service.pauses(), service.drivers()
    now, held = service.now(), service.num_held()
    failures = service.failures()
    records = service.jobs(order=order, limit=limit)
    output.document(
        {
            "counts": {state.value: count for state, count in counts.items()},
            "batches": [batch_document(each) for each in batches],
            "paused": [plain(each) | {"num_jobs": held.get(each.key, 0)} for each in pauses],
            "drivers": [plain(each) for each in drivers],
            "failures": [plain(each) for each in failures],
            "jobs": [job_document(record) for record in records],
            "num_jobs": sum(counts.values()),
        }
    )
    if records:
        output.show(job_table(records))
        _show_rest(output, sum(counts.values()) - len(records))
    if batches:
        output.show(batch_table(batches))
    if drivers:
        output.show(driver_table(drivers, now))
    for pause in pauses:
        output.show(pause_line(pause, now))
    if failures:
        output.show(failure_table(failures))
    output.show(state_counts(counts))


def show_jobs(
    output: Terminal, service: "Service", selection: Selection, *, limit: int, order: Order, with_events: bool
) -> None:
    """Show the jobs that were asked for.

    Args:
        output: gets them.
        service: the queue.
        selection: which jobs.
        limit: how many at most; all that were named by id.
        order: of the jobs.
        with_events: whether all that happened to them is shown, too.

    Raises:
        BadInputError: an id is no job's.
    """
    records = service.jobs(selection, order=order, limit=None if selection.ids is not None else limit)
    if selection.ids is not None and (unknown := set(selection.ids) - {record.id for record in records}):
        raise BadInputError(f"no such job: {', '.join(sorted(unknown))}")
    documents = [job_document(record) for record in records]
    histories = _histories(service, records) if with_events else []
    for document, history in zip(documents, histories, strict=False):
        document.update(history_document(history))
    counts = service.counts() if with_events else service.counts(selection)
    failures = () if with_events else service.failures(selection)
    output.document(
        {
            "counts": {state.value: count for state, count in counts.items()},
            "failures": [plain(each) for each in failures],
            "jobs": documents,
            "num_jobs": len(records) if with_events else sum(counts.values()),
        }
    )
    if records:
        output.show(job_table(records))
    if histories:
        output.show(history_table(histories))
        for record, history in zip(records, histories, strict=True):
            output.show(next_line(record, history))
        return
    _show_rest(output, sum(counts.values()) - len(records))
    if failures:
        output.show(failure_table(failures))
    output.show(state_counts(counts))


def _histories(service: "Service", records: Sequence[JobRecord]) -> list[History]:
    around = Surroundings(now=service.now(), pauses=service.pauses(), drivers=service.drivers())
    return [history_of(record, service.events(record.id), around) for record in records]


def _show_rest(output: Terminal, num_more: int) -> None:
    if num_more > 0:
        output.show(f"… and {num_more} more: --limit, --batch, --state, --label, --since and --sort choose")
