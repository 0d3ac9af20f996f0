"""The API: one entry for each thing that can be asked, from which calls are validated, answered and documented."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.front import wire
from cluster.front.ledger import LedgerService
from jobs.ledger.records import JobPage, JobRecord, SubmitResult
from jobs.locations import Elsewhere
from jobs.parity_report import ParityReport
from jobs.policy import FailurePolicy
from jobs.release import Release
from jobs.request_files.reading import Origin

FILES: Mapping[str, str] = {
    "application/json": ".json",
    "application/yaml": ".yaml",
    "application/jsonl": ".jsonl",
    "text/csv": ".csv",
}
"""Media types of request files, and the endings of their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One question, validated."""

    path: Mapping[str, str]
    query: Any
    """Of the endpoint's model."""
    body: Any
    """Of the endpoint's model; of a request file its text."""
    media_type: str
    """Of the body."""
    accept: str


@dataclass(frozen=True, slots=True)
class Written:
    """An answer that is written already."""

    content: bytes
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One thing that can be asked."""

    method: str
    path: str
    name: str
    summary: str
    call: Callable[[LedgerService, Call], Any]
    answer: Any
    """Type of what `call` returns."""
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    takes_files: bool = False
    """Whether the body may also be the text of a request file."""
    also: tuple[str, ...] = ()
    """Media types that it answers with when they are asked for, beside JSON."""
    is_open: bool = False
    """Whether it asks for no token."""


def _submit(service: LedgerService, call: Call) -> SubmitResult:
    directory = call.query.directory
    place = Elsewhere(None if directory is None else Path(directory))
    origin = Origin(call.query.name, FILES[call.media_type], place)
    return service.submit_text(call.body, origin, call.path["name"])


def _page(service: LedgerService, call: Call) -> JobPage:
    asked: wire.Page = call.query
    return service.page(asked.selection(asked.id), order=asked.order, limit=asked.limit, cursor=asked.cursor)


def _counts(service: LedgerService, call: Call) -> wire.Counts:
    selection = call.query.selection()
    return wire.Counts(now=service.now(), counts=service.counts(selection), held=service.num_held(selection))


def _report(service: LedgerService, call: Call) -> ParityReport | Written:
    if prefers(call.accept, "text/html"):
        return Written(service.report_file(call.path["id"], page=True), "text/html; charset=utf-8")
    return service.report(call.path["id"])


def _health(service: LedgerService, _call: Call) -> wire.Health:
    service.now()
    return wire.Health()


def prefers(accept: str, media_type: str) -> bool:
    """Whether an Accept header names this type before JSON and before any."""
    named = [each.partition(";")[0].strip().lower() for each in accept.split(",")]
    return next((each == media_type for each in named if each in (media_type, "application/json", "*/*")), False)


EVENT_STREAM = "text/event-stream"

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        method="POST",
        path="/v1/batches/{name}",
        name="submit",
        summary="Queue requests as a batch, or none when one is wrong. The same requests twice change nothing.",
        call=_submit,
        query=wire.Submission,
        body=wire.Requests,
        takes_files=True,
        answer=SubmitResult,
    ),
    Endpoint(
        method="GET",
        path="/v1/batches",
        name="batches",
        summary="All batches, oldest first.",
        call=lambda service, _: wire.Batches(batches=tuple(map(wire.BatchAnswer.of, service.batches()))),
        answer=wire.Batches,
    ),
    Endpoint(
        method="GET",
        path="/v1/batches/{name}",
        name="batch",
        summary="One batch.",
        call=lambda service, call: wire.BatchAnswer.of(service.batch(call.path["name"])),
        answer=wire.BatchAnswer,
    ),
    Endpoint(
        method="GET",
        path="/v1/jobs",
        name="jobs",
        summary="A page of jobs.",
        call=_page,
        query=wire.Page,
        answer=JobPage,
    ),
    Endpoint(
        method="GET",
        path="/v1/jobs/{id}",
        name="job",
        summary="One job.",
        call=lambda service, call: service.job(call.path["id"]),
        answer=JobRecord,
    ),
    Endpoint(
        method="GET",
        path="/v1/jobs/{id}/events",
        name="job_events",
        summary="What happened to a job; as server-sent events when asked for, from Last-Event-ID on.",
        call=lambda service, call: wire.Events(events=service.events(call.path["id"], call.query.after)),
        query=wire.After,
        answer=wire.Events,
        also=(EVENT_STREAM,),
    ),
    Endpoint(
        method="GET",
        path="/v1/jobs/{id}/report",
        name="job_report",
        summary="The parity report of a job, as JSON or as the page for people.",
        call=_report,
        answer=ParityReport,
        also=("text/html",),
    ),
    Endpoint(
        method="GET",
        path="/v1/jobs/{id}/release",
        name="job_release",
        summary="The release of a job, with its manifest.",
        call=lambda service, call: service.release(call.path["id"]),
        answer=Release,
    ),
    Endpoint(
        method="GET",
        path="/v1/counts",
        name="counts",
        summary="How many jobs are in each state, and how many are held by which pause.",
        call=_counts,
        query=wire.Filter,
        answer=wire.Counts,
    ),
    Endpoint(
        method="GET",
        path="/v1/work",
        name="work",
        summary="How far the work on each base is.",
        call=lambda service, call: wire.AllWork(work=service.work(call.query.selection())),
        query=wire.Filter,
        answer=wire.AllWork,
    ),
    Endpoint(
        method="GET",
        path="/v1/failures",
        name="failures",
        summary="Failures by cause, the most frequent first.",
        call=lambda service, call: wire.Failures(failures=service.failures(call.query.selection())),
        query=wire.Filter,
        answer=wire.Failures,
    ),
    Endpoint(
        method="POST",
        path="/v1/cancel",
        name="cancel",
        summary="Cancel jobs: those that wait at once, those at work within seconds.",
        call=lambda service, call: wire.Changed(changed=service.cancel(call.body.selection(call.body.id))),
        body=wire.Choice,
        answer=wire.Changed,
    ),
    Endpoint(
        method="POST",
        path="/v1/retry",
        name="retry",
        summary="Queue jobs again that failed, were cancelled or quarantined, or wait for their time.",
        call=lambda service, call: wire.Changed(changed=service.retry(call.body.selection(call.body.id))),
        body=wire.Choice,
        answer=wire.Changed,
    ),
    Endpoint(
        method="POST",
        path="/v1/approve",
        name="approve",
        summary="Let jobs that wait for approval be published, in a person's name.",
        call=lambda service, call: wire.Changed(
            changed=service.approve(call.body.selection(call.body.id), call.body.by)
        ),
        body=wire.Approval,
        answer=wire.Changed,
    ),
    Endpoint(
        method="POST",
        path="/v1/reject",
        name="reject",
        summary="Cancel jobs that wait for approval, in a person's name.",
        call=lambda service, call: wire.Changed(
            changed=service.reject(call.body.selection(call.body.id), call.body.by, call.body.reason)
        ),
        body=wire.Rejection,
        answer=wire.Changed,
    ),
    Endpoint(
        method="GET",
        path="/v1/pauses",
        name="pauses",
        summary="What is paused, by whom and why.",
        call=lambda service, _: wire.Pauses(pauses=service.pauses()),
        answer=wire.Pauses,
    ),
    Endpoint(
        method="POST",
        path="/v1/pause",
        name="pause",
        summary="Keep jobs from being started: all, or those of a batch, base or place.",
        call=lambda service, call: wire.PauseAnswer(
            changed=service.pause(call.body.scope, call.body.name, call.body.by, call.body.reason)
        ),
        body=wire.PauseBody,
        answer=wire.PauseAnswer,
    ),
    Endpoint(
        method="POST",
        path="/v1/resume",
        name="resume",
        summary="Let jobs be started again.",
        call=lambda service, call: wire.Pauses(pauses=service.resume(call.body.scope, call.body.name)),
        body=wire.ResumeBody,
        answer=wire.Pauses,
    ),
    Endpoint(
        method="GET",
        path="/v1/drivers",
        name="drivers",
        summary="The drivers that work, or hold leases.",
        call=lambda service, _: wire.Drivers(drivers=service.drivers()),
        answer=wire.Drivers,
    ),
    Endpoint(
        method="POST",
        path="/v1/release-leases",
        name="release_leases",
        summary="Take the jobs of a driver that is lost or hangs, without waiting for its leases.",
        call=lambda service, call: wire.Released(released=service.release_leases(call.body.driver)),
        body=wire.DriverBody,
        answer=wire.Released,
    ),
    Endpoint(
        method="GET",
        path="/v1/policy",
        name="policy",
        summary="What follows each class of failure.",
        call=lambda service, _: service.policy(),
        answer=FailurePolicy,
    ),
    Endpoint(
        method="GET",
        path="/healthz",
        name="health",
        summary="Whether the ledger answers. Asks for no token.",
        call=_health,
        answer=wire.Health,
        is_open=True,
    ),
)
