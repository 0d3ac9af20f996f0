"""Traces: what a receiver of OpenTelemetry is sent of jobs that have ended, and what it costs when it is away."""

import contextlib
import gzip
import http.server
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cluster.driving.events import JobSettled
from cluster.traces import trace_id, tracing
from jobs.errors import FailureClass
from jobs.ledger.store import JobStore
from jobs.states import Decision, JobState
from tests.releases import advance, begin, settle
from tests.unit.cluster.driving.scripted import release, request


@pytest.fixture
def receiver():
    """Start a server that takes traces; return its address, and the list they come into."""
    came = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            came.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", came
        server.shutdown()
        thread.join()


def spans_of(came):
    assert {path for path, _ in came} <= {"/v1/traces"}
    return [
        span
        for _, request in came
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def said(span):
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(JobStore(f"sqlite:///{tmp_path}/jobs.db")) as store:
        yield store


def claim(store):
    (lease,) = store.claim("driver", 1, 60)
    return lease.token


def publish(store, name):
    token = claim(store)
    begin(store, name, token)
    advance(store, name, token, JobState.VERIFYING)
    detail = {"unit": {"jobs": 1, "bytes_read": 5, "seconds": {"merge": 1.5}}}
    store.advance({name: token}, JobState.PUBLISHING, None, detail)
    settle(store, name, token, release(name), None)


def settled(name, state):
    return JobSettled(job_id=name, state=state)


def test_a_job_is_one_trace_from_submit_to_publish(store, receiver):
    endpoint, came = receiver
    store.submit([request("one")], "nightly")
    with tracing(store, endpoint, "driver-1") as listener:
        publish(store, "one")
        listener(settled("one", JobState.PUBLISHED))
    (resource,) = {request.resource_spans[0].resource.SerializeToString() for _, request in came}
    assert b"driver-1" in resource
    spans = {span.name: span for span in spans_of(came)}
    events = store.events("one")
    assert list(spans) == [*(event.state.value.lower() for event in events[:-1]), "job"]
    job = spans.pop("job")
    assert int.from_bytes(job.trace_id, "big") == trace_id("one", events[0])
    assert {span.trace_id for span in spans.values()} == {job.trace_id}
    assert {span.parent_span_id for span in spans.values()} == {job.span_id}
    assert job.start_time_unix_nano == int(events[0].at * 1e9)
    assert job.end_time_unix_nano == int(events[-1].at * 1e9)
    assert said(job)["mergefleet.batch"] == "nightly"
    assert said(job)["mergefleet.state"] == "PUBLISHED"
    assert said(spans["publishing"])["mergefleet.pass.seconds.merge"] == 1.5
    assert said(spans["planning"])["mergefleet.worker"] == "merge-worker-0"


def test_a_failure_is_said_where_it_was_and_what_follows_a_retry_is_another_trace(store, receiver):
    endpoint, came = receiver
    store.submit([request("one")])
    with tracing(store, endpoint, "driver-1") as listener:
        token = claim(store)
        begin(store, "one", token)
        store.fail("one", token, FailureClass.NOT_FOUND, "no such base", Decision(state=JobState.FAILED))
        listener(settled("one", JobState.FAILED))
    failed = {span.name: span.status.message for span in spans_of(came) if span.status.message}
    assert failed == {"planning": "not_found: no such base", "job": "not_found: no such base"}
    first = {span.trace_id for span in spans_of(came)}
    came.clear()
    store.retry(["one"])
    with tracing(store, endpoint, "driver-2") as listener:
        publish(store, "one")
        listener(settled("one", JobState.PUBLISHED))
        listener(settled("never heard of", JobState.PUBLISHED))
        listener(settled("one", JobState.RETRY_WAIT))
    second = {span.trace_id for span in spans_of(came)}
    assert len(first) == len(second) == 1
    assert first != second
    assert next(span.name for span in spans_of(came)) == "queued"


def test_a_receiver_that_is_away_costs_traces_and_nothing_else(store):
    store.submit([request("one")])
    with tracing(store, "http://127.0.0.1:9", "driver-1") as listener:
        publish(store, "one")
        listener(settled("one", JobState.PUBLISHED))
    assert store.jobs()[0].state is JobState.PUBLISHED
