"""The API: one entry for each thing that can be asked, from which calls are validated, answered and documented."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.front import wire
from cluster.front.endpoint import EVENT_STREAM, FILES, Call, Endpoint, Written, prefers
from cluster.front.ledger import LedgerService
from jobs.ledger.records import JobPage, JobRecord, SubmitResult
from jobs.ledger.selection import Selection
from jobs.locations import Elsewhere
from jobs.parity_report import ParityReport
from jobs.policy import FailurePolicy
from jobs.release import Release
from jobs.request_files.reading import Origin


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


def _changing(
    name: str,
    summary: str,
    change: Callable[[LedgerService, Selection, Any], tuple[str, ...]],
    body: type[wire.Choice] = wire.Choice,
) -> Endpoint:
    """Return the endpoint that changes the jobs that its body chooses.

    Args:
        name: of the endpoint, and of its path.
        summary: for the document.
        change: takes the service, the chosen jobs and the body; returns the ids of those that it changed.
        body: what it takes.
    """

    def call(service: LedgerService, call: Call) -> wire.Changed:
        return wire.Changed(changed=change(service, call.body.selection(call.body.id), call.body))

    return Endpoint(
        method="POST", path=f"/v1/{name}", name=name, summary=summary, call=call, body=body, answer=wire.Changed
    )


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
    _changing(
        "cancel",
        "Cancel jobs: those that wait at once, those at work within seconds.",
        lambda service, jobs, _: service.cancel(jobs),
    ),
    _changing(
        "retry",
        "Queue jobs again that failed, were cancelled or quarantined, or wait for their time.",
        lambda service, jobs, _: service.retry(jobs),
    ),
    _changing(
        "approve",
        "Let jobs that wait for approval be published, in a person's name.",
        lambda service, jobs, body: service.approve(jobs, body.by),
        wire.ApprovalBody,
    ),
    _changing(
        "reject",
        "Cancel jobs that wait for approval, in a person's name.",
        lambda service, jobs, body: service.reject(jobs, body.by, body.reason),
        wire.RejectionBody,
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
