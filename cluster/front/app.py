"""The server: each endpoint behind the door, errors as problem documents, never a fault for what a client sends."""

import functools
import importlib.metadata
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import anyio.to_thread
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.front import wire
from cluster.front.asking import call_of, read_query
from cluster.front.door import HEADERS, Door
from cluster.front.endpoint import EVENT_STREAM, Call, Endpoint, Written, prefers
from cluster.front.endpoints import ENDPOINTS
from cluster.front.ledger import LedgerService
from cluster.front.openapi import CHANGES_PATH, openapi_document
from cluster.front.problems import MEDIA_TYPE, RETRY_SECONDS, RefusedError, document_of, status_of
from cluster.front.streams import Ask, ChangeFeed, JobFeed, last_event_id, stream
from jobs.errors import BadInputError, InternalError, MergefleetError, NoCapacityError, NotFoundError

logger = logging.getLogger(__name__)

_MAX_AT_ONCE = 8
"""Questions to the ledger at one time: as many connections as its pool may have."""
_MAX_STREAMS = 200
"""Open at one time: each asks the ledger again and again."""
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'none'"
"""Of the pages that workers write: no script, no other place."""

Handler = Callable[[Request], Awaitable[Response]]


class Front:
    """What answers.

    Args:
        service: the queue.
        door: lets in.
        poll_seconds: how often streams ask the ledger.
        is_stopping: whether the server is about to end.
    """

    def __init__(
        self, service: LedgerService, door: Door, *, poll_seconds: float, is_stopping: Callable[[], bool]
    ) -> None:
        self._service = service
        self._door = door
        self._poll_seconds = poll_seconds
        self._is_stopping = is_stopping
        self._num_streams = 0
        self._limiter = anyio.CapacityLimiter(_MAX_AT_ONCE)

    def app(self, pages: Sequence[BaseRoute] = ()) -> Starlette:
        """Return the application.

        Args:
            pages: for people.
        """
        routes: list[BaseRoute] = [
            Route(each.path, self.guarded(self._handler(each), is_open=each.is_open), methods=[each.method])
            for each in ENDPOINTS
        ]
        routes += [
            Route(CHANGES_PATH, self.guarded(self._changes), methods=["GET"]),
            Route("/openapi.json", self.guarded(self._openapi), methods=["GET"]),
            *pages,
        ]
        handlers: dict[Any, Any] = {HTTPException: self._no_such_route}
        return Starlette(routes=routes, exception_handlers=handlers)

    def guarded(self, handler: Handler, *, is_open: bool = False) -> Handler:
        """Return a handler that lets in only who may, and answers errors with problem documents."""

        async def guard(request: Request) -> Response:
            try:
                if not is_open:
                    self._door.check(request)
                response = await handler(request)
            except ClientDisconnect:
                return Response(status_code=400)
            except RefusedError as error:
                response = problem(error.error, error.status, error.headers)
            except MergefleetError as error:
                response = problem(error, status_of(error))
            except Exception:
                logger.exception("a request failed", extra={"method": request.method, "path": request.url.path})
                fault = InternalError("this is a fault of mergefleet; its log has the traceback")
                response = problem(fault, 500)
            return _with_headers(response)

        return guard

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call what asks the ledger, beside the loop."""
        return await anyio.to_thread.run_sync(call, *arguments, limiter=self._limiter)

    def _handler(self, endpoint: Endpoint) -> Handler:
        adapter = _adapter(endpoint)

        def answer(call: Call) -> Written:
            found = endpoint.call(self._service, call)
            if isinstance(found, Written):
                return found
            return Written(adapter.dump_json(found, by_alias=True), "application/json")

        async def handle(request: Request) -> Response:
            call = await call_of(request, endpoint)
            if EVENT_STREAM in endpoint.also and prefers(call.accept, EVENT_STREAM):
                return await self._job_stream(request, call)
            written: Written = await self.in_thread(answer, call)
            headers = {"Content-Security-Policy": _REPORT_POLICY} if "text/html" in written.media_type else {}
            return Response(written.content, media_type=written.media_type, headers=headers)

        return handle

    async def _job_stream(self, request: Request, call: Call) -> Response:
        last = last_event_id(request, int, 2**31 - 1)
        await self.in_thread(self._service.job, call.path["id"])  # else an unknown one is waited for
        feed = JobFeed(self._service.open(), call.path["id"], call.query.after if last is None else last)
        return self._stream(feed)

    async def _changes(self, request: Request) -> Response:
        asked: wire.Since = read_query(request, wire.Since)
        last = last_event_id(request, float, 1e11)
        since = asked.since if last is None else last
        if since is None:
            since = await self.in_thread(self._service.now)
        feed = ChangeFeed(self._service.open(), since, resumes=last is not None)
        return self._stream(feed)

    def _stream(self, ask: Ask) -> Response:
        if self._num_streams >= _MAX_STREAMS:
            raise RefusedError(503, NoCapacityError(f"{_MAX_STREAMS} streams are open, as many as may be"))
        return stream(ask, self._limiter, self._poll_seconds, self._is_stopping, self._count_streams)

    def _count_streams(self, change: int) -> None:
        self._num_streams += change

    async def _openapi(self, request: Request) -> Response:
        read_query(request, None)
        return Response(await self.in_thread(_document), media_type="application/json")

    async def _no_such_route(self, request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            words = f"expected {allowed} for {request.url.path}, found {request.method}"
            return _with_headers(problem(BadInputError(words), 405, {"Allow": allowed}))
        if error.status_code == 404:
            words = f"there is nothing at {request.url.path}; /openapi.json lists what is"
            return _with_headers(problem(NotFoundError(words), 404))
        return _with_headers(problem(BadInputError(str(error.detail)), error.status_code))


@functools.cache
def _adapter(endpoint: Endpoint) -> TypeAdapter[Any]:
    return TypeAdapter(endpoint.answer)


@functools.cache
def _document() -> bytes:
    return json.dumps(openapi_document(importlib.metadata.version("mergefleet"))).encode()


def problem(error: MergefleetError, status: int, headers: dict[str, str] | None = None) -> Response:
    """Return the answer that says what went wrong."""
    more = dict(headers or {})
    if status == 503:
        more["Retry-After"] = str(RETRY_SECONDS)
    content = document_of(error, status).model_dump_json().encode(errors="replace")
    return Response(content, status_code=status, media_type=MEDIA_TYPE, headers=more)


def _with_headers(response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response
