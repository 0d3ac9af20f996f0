"""Pages for people, to read: the queue, a batch, a job, a release. Rendered here, fresh whenever something changes."""

import secrets
import urllib.parse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.front import wire
from cluster.front.app import Front, Handler
from cluster.front.asking import read_bytes, read_path, read_query
from cluster.front.door import COOKIE, HEADERS, SESSION_SECONDS, Door
from cluster.front.ledger import LedgerService
from cluster.front.problems import RefusedError, status_of
from jobs.errors import MergefleetError
from jobs.ledger.records import Event
from jobs.ledger.selection import Selection
from jobs.states import ACTIVE_STATES, UNSUCCESSFUL_STATES, WAITING_STATES, JobState
from jobs.text import MAX_MESSAGE, shown

_MAX_JOBS = 50
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


class Pages:
    """What people see in a browser.

    Args:
        front: answers, and keeps the ledger from being asked too much at a time.
        service: the queue.
        door: lets in.
    """

    def __init__(self, front: Front, service: LedgerService, door: Door) -> None:
        self._front = front
        self._service = service
        self._door = door
        self._environment = Environment(
            loader=PackageLoader("cluster.front"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {"text": _text, "time": _time, "duration": _duration, "part": _part}
        self._environment.globals |= {"JobState": JobState}

    def routes(self) -> list[BaseRoute]:
        """Return where they are."""
        return [
            Route("/", self._page(self._queue), methods=["GET"]),
            Route("/batches/{name}", self._page(self._batch), methods=["GET"]),
            Route("/jobs/{id}", self._page(self._job), methods=["GET"]),
            Route("/jobs/{id}/release", self._page(self._release), methods=["GET"]),
            Route("/login", self._front.guarded(self._login_form, is_open=True), methods=["GET"]),
            Route("/login", self._front.guarded(self._login, is_open=True), methods=["POST"]),
        ]

    def _page(self, handler: Handler) -> Handler:
        """Return what leads those who have shown no token to the form, and tells errors as a page."""

        async def handle(request: Request) -> Response:
            try:
                self._door.check(request)
            except RefusedError as error:
                if error.status != 401:
                    raise
                return RedirectResponse("/login", status_code=303)
            try:
                return await handler(request)
            except MergefleetError as error:
                return self._render("error.html.j2", status_of(error), error=error, title="error")

        return self._front.guarded(handle, is_open=True)

    async def _queue(self, request: Request) -> Response:
        read_query(request, None)
        return self._render("queue.html.j2", **await self._front.in_thread(self._queue_values))

    def _queue_values(self) -> dict[str, Any]:
        service = self._service
        return {
            "title": "queue",
            "now": service.now(),
            "counts": service.counts(),
            "batches": [_batch_row(wire.BatchAnswer.of(each)) for each in reversed(service.batches())],
            "pauses": service.pauses(),
            "held": service.num_held(),
            "drivers": service.drivers(),
            "failures": service.failures(),
            "webhooks": service.open().webhooks(),
            "jobs": service.jobs(order="updated", limit=_MAX_JOBS),
        }

    async def _batch(self, request: Request) -> Response:
        asked: wire.Page = read_query(request, wire.Page)
        name = read_path(request)["name"]

        def values() -> dict[str, Any]:
            batch = wire.BatchAnswer.of(self._service.batch(name))
            selection = Selection(batch=name, states=asked.state or None)
            page = self._service.page(selection, order=asked.order, limit=_MAX_JOBS, cursor=asked.cursor)
            return {
                "title": f"batch {name}",
                "batch": _batch_row(batch),
                "counts": batch.counts,
                "failures": self._service.failures(Selection(batch=name)),
                "jobs": page.jobs,
                "chosen": asked.state,
                "next": None if page.next_cursor is None else _next(asked, page.next_cursor),
            }

        return self._render("batch.html.j2", **await self._front.in_thread(values))

    async def _job(self, request: Request) -> Response:
        read_query(request, None)
        job_id = read_path(request)["id"]

        def values() -> dict[str, Any]:
            job, events = self._service.job(job_id), self._service.events(job_id)
            return {"title": f"job {job_id}", "job": job, "steps": _steps(events, self._service.now(), job.state)}

        return self._render("job.html.j2", **await self._front.in_thread(values))

    async def _release(self, request: Request) -> Response:
        read_query(request, None)
        job_id = read_path(request)["id"]
        release = await self._front.in_thread(self._service.release, job_id)
        return self._render("release.html.j2", title=f"release of {job_id}", job_id=job_id, release=release)

    async def _login_form(self, request: Request) -> Response:
        read_query(request, None)
        if not self._door.is_locked:
            return RedirectResponse("/", status_code=303)
        return self._render("login.html.j2", title="log in", wrong=False)

    async def _login(self, request: Request) -> Response:
        body = (await read_bytes(request))[:10_000].decode(errors="replace")
        token = urllib.parse.parse_qs(body).get("token", [""])[0].strip()
        if not self._door.is_locked:
            return RedirectResponse("/", status_code=303)
        if not self._door.knows(token):
            return self._render("login.html.j2", 403, title="log in", wrong=True)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            COOKIE,
            self._door.make_session(),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    def _render(self, template: str, status: int = 200, **values: Any) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = self._environment.get_template(template).render(nonce=nonce, **values)
        headers = {**HEADERS, "Content-Security-Policy": _POLICY.format(nonce=nonce)}
        return Response(text.encode(errors="replace"), status, media_type="text/html; charset=utf-8", headers=headers)


def _batch_row(batch: wire.BatchAnswer) -> dict[str, Any]:
    counts = batch.counts
    return {
        "name": batch.name,
        "created_at": batch.created_at,
        "total": batch.request_counts.total,
        "completed": batch.request_counts.completed,
        "failed": sum(counts[state] for state in UNSUCCESSFUL_STATES),
        "cancelled": batch.request_counts.cancelled,
        "active": sum(counts[state] for state in ACTIVE_STATES),
        "waiting": sum(counts[state] for state in WAITING_STATES),
    }


def _steps(events: Sequence[Event], now: float, state: JobState) -> list[dict[str, Any]]:
    """Return events with how long the job stayed in each state; the last one lasts, if work goes on."""
    ends = [event.at for event in events[1:]] + [now if state in ACTIVE_STATES | WAITING_STATES else None]
    return [
        {
            "event": event,
            "seconds": None if end is None else max(0.0, end - event.at),
            "worker": event.detail.get("worker"),
            "node": event.detail.get("node"),
            "detail": {name: each for name, each in event.detail.items() if name not in ("worker", "node")},
        }
        for event, end in zip(events, ends, strict=False)
    ]


def _next(asked: wire.Page, cursor: str) -> str:
    parts = [("state", state.value) for state in asked.state]
    return "?" + urllib.parse.urlencode([*parts, ("order", asked.order), ("cursor", cursor)])


def _text(value: object) -> str:
    """Return text from outside with nothing in it that acts or hides; the template escapes it."""
    return shown(value, MAX_MESSAGE)


def _part(value: object) -> str:
    """Return text as one part of the path of an address."""
    return urllib.parse.quote(str(value), safe="")


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
