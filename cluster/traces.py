"""Traces of jobs, from submit to publish, for OpenTelemetry: made of the ledger's events once a job has ended."""

import contextlib
import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Span, Status, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue

from cluster.driving.events import DriverEvent, JobSettled
from jobs.ledger.records import Event, JobRecord
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.states import FINAL_STATES

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 5.0
_CLOSE_SECONDS = 10.0
_MAX_SPANS_WAITING = 1 << 16
_NANOSECONDS = 10**9


@contextlib.contextmanager
def tracing(store: JobStore, endpoint: str, owner: str) -> Iterator[Callable[[DriverEvent], None]]:
    """Yield what a driver tells its events; a thread sends a trace of every job that has ended.

    A receiver that is away, or slow, costs traces and nothing else.

    Args:
        store: the ledger.
        endpoint: of the receiver, OTLP over HTTP, such as `http://127.0.0.1:4318`.
        owner: names this driver.
    """
    provider = TracerProvider(
        resource=Resource.create({"service.name": "mergefleet", "service.instance.id": owner}),
        id_generator=(ids := _Ids()),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_TIMEOUT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_MAX_SPANS_WAITING))
    ended: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def send() -> None:
        while (job_id := ended.get()) is not None:
            try:
                (record,) = store.jobs(Selection(ids=[job_id]))
                _trace(provider, ids, record, store.events(job_id))
            except Exception:
                # The thread's edge: what cannot be traced has been merged all the same.
                logger.exception("a job was not traced", extra={"job_id": job_id})

    def listener(event: DriverEvent) -> None:
        if isinstance(event, JobSettled) and event.state in FINAL_STATES:
            ended.put(event.job_id)

    thread = threading.Thread(target=send, name="traces", daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        ended.put(None)
        thread.join(_CLOSE_SECONDS)
        provider.shutdown()


def trace_id(job_id: str, first: Event) -> int:
    """Return the trace of a job, from its id and the event that it begins with: who knows them can look it up."""
    return int.from_bytes(hashlib.sha256(f"{job_id}#{first.sequence}".encode()).digest()[:16], "big") or 1


class _Ids(RandomIdGenerator):
    """Gives the next trace the id it is told; for one thread."""

    trace_id = 1

    def generate_trace_id(self) -> int:
        return self.trace_id


def _trace(provider: TracerProvider, ids: _Ids, record: JobRecord, events: Sequence[Event]) -> None:
    """Make the spans of what led to the last end of a job: one for it, and in that one for each state."""
    ends = [number for number, event in enumerate(events) if event.state in FINAL_STATES]
    if not ends:
        return  # a person has it tried again already
    first = ends[-2] + 1 if len(ends) > 1 else 0
    steps = events[first : ends[-1] + 1]
    tracer = provider.get_tracer("mergefleet")
    ids.trace_id = trace_id(record.id, steps[0])
    root = tracer.start_span("job", start_time=_at(steps[0]), attributes=_of_job(record, steps[-1]))
    for step, following in pairwise(steps):
        context = set_span_in_context(root)
        span = tracer.start_span(step.state.value.lower(), context, start_time=_at(step), attributes=_of_step(step))
        _judge(span, following)
        span.end(_at(following))
    _judge(root, steps[-1])
    root.end(_at(steps[-1]))


def _judge(span: Span, event: Event) -> None:
    """Say of a span whether it ended in a failure."""
    if (failure := event.detail.get("failure")) is not None:
        span.set_status(Status(StatusCode.ERROR, f"{failure}: {event.detail.get('message', '')}"))


def _of_job(record: JobRecord, last: Event) -> dict[str, AttributeValue]:
    said = {
        "job": record.id,
        "batch": record.batch,
        "base": str(record.request.base),
        "adapter": record.request.adapter_words,
        "destination": str(record.request.destination),
        "state": last.state.value,
        "attempts": record.attempts,
        "merge_key": record.merge_key,
    }
    return {f"mergefleet.{name}": value for name, value in said.items() if value is not None}


def _of_step(event: Event) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {}
    for name, value in event.detail.items():
        if isinstance(value, str | int | float):
            found[f"mergefleet.{name}"] = value
    unit = event.detail.get("unit")
    for name, value in unit.items() if isinstance(unit, dict) else ():
        if isinstance(value, int | float):
            found[f"mergefleet.pass.{name}"] = value
        for stage, seconds in value.items() if isinstance(value, dict) else ():
            if isinstance(seconds, int | float):
                found[f"mergefleet.pass.{name}.{stage}"] = seconds
    return found


def _at(event: Event) -> int:
    return int(event.at * _NANOSECONDS)
