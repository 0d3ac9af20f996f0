"""Changes as they happen, as server-sent events: of one job, or of all."""

import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import anyio
import anyio.to_thread
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import StreamingResponse

from cluster.front.endpoint import EVENT_STREAM
from jobs.errors import InvalidValueError, MergefleetError
from jobs.ledger.records import Event
from jobs.ledger.store import JobStore

logger = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 15.0
"""Proxies end connections that are silent for longer."""
_MAX_EVENTS = 2000
"""In one piece of a stream."""
_EVENT = TypeAdapter(Event)
_Number = TypeVar("_Number", int, float)

Ask = Callable[[], Sequence[tuple[str, Event]]]
"""Returns the next events, each with the id that a client resumes with."""


class JobFeed:
    """What happens to one job. The id of an event is its number."""

    def __init__(self, store: JobStore, job_id: str, after: int) -> None:
        self._store = store
        self._job_id = job_id
        self._after = after

    def __call__(self) -> Sequence[tuple[str, Event]]:
        """Return what is new."""
        found = self._store.events(self._job_id, self._after)
        self._after = max((event.sequence for event in found), default=self._after)
        return [(str(event.sequence), event) for event in found]


class ChangeFeed:
    """What happens to all jobs, each event at least once. The id of an event is its time.

    Where several may write at one time (Postgres), an event may become visible after later ones: those of the last
    minute are looked at again, and after a pause of the client sent again.

    Args:
        store: the ledger.
        since: from which time on, seconds since 1970.
        resumes: whether the client has had events up to that time.
    """

    def __init__(self, store: JobStore, since: float, *, resumes: bool) -> None:
        self._store = store
        self._settling = store.settling_seconds()
        self._first = since - self._settling if resumes else since
        self._newest = since
        self._sent: dict[tuple[str, int], float] = {}

    def __call__(self) -> Sequence[tuple[str, Event]]:
        """Return what is new."""
        window = self._newest - self._settling
        self._sent = {key: at for key, at in self._sent.items() if at >= window}
        changes = self._store.changes(max(self._first, window))
        new = (event for event in changes if (event.job_id, event.sequence) not in self._sent)
        found = list(itertools.islice(new, _MAX_EVENTS))
        for event in found:
            self._sent[event.job_id, event.sequence] = event.at
            self._newest = max(self._newest, event.at)
        return [(repr(event.at), event) for event in found]


def stream(
    ask: Ask,
    limiter: anyio.CapacityLimiter,
    poll_seconds: float,
    is_stopping: Callable[[], bool],
    count: Callable[[int], None],
) -> StreamingResponse:
    """Return a stream of events; it ends when the client goes, the server stops, or the ledger does not answer.

    Args:
        ask: for what is new.
        limiter: of what asks the ledger at one time.
        poll_seconds: how often it is asked.
        is_stopping: whether the server is about to end.
        count: is told when a stream begins (1) and ends (-1).
    """

    async def parts() -> AsyncIterator[bytes]:
        count(1)
        try:
            async for part in all_parts():
                yield part
        finally:
            count(-1)

    async def all_parts() -> AsyncIterator[bytes]:
        yield b"retry: 2000\n\n"
        said = time.monotonic()
        while not is_stopping():
            try:
                found = await anyio.to_thread.run_sync(ask, limiter=limiter)
            except MergefleetError as error:
                logger.warning("a stream of events ends: the ledger does not answer", extra={"error": str(error)})
                return
            if found:
                yield b"".join(b"id: %s\ndata: %s\n\n" % (id_.encode(), _EVENT.dump_json(each)) for id_, each in found)
            elif time.monotonic() - said > _KEEP_ALIVE_SECONDS:
                yield b": still here\n\n"
            else:
                await anyio.sleep(poll_seconds)
                continue
            said = time.monotonic()

    return StreamingResponse(parts(), media_type=EVENT_STREAM, headers={"X-Accel-Buffering": "no"})


def last_event_id(request: Request, kind: type[_Number], most: _Number) -> _Number | None:
    """Return the id of the last event that a client has had, or None where it had none.

    Raises:
        InvalidValueError: it is no id of this stream.
    """
    text = request.headers.get("last-event-id")
    if text is None or not text:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = kind(-1)
    if not (math.isfinite(value) and 0 <= value <= most):
        raise InvalidValueError("the id of an event of this stream in Last-Event-ID", repr(text[:100]))
    return value
