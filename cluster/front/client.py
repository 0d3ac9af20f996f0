"""A queue behind a server: the typed client of the HTTP API."""

import http
import json
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from pydantic import TypeAdapter, ValidationError

from cluster.front import wire
from cluster.front.problems import error_of
from jobs.batch import batch_name
from jobs.errors import (
    AuthError,
    BadInputError,
    InternalError,
    InvalidValueError,
    MergefleetError,
    NotFoundError,
    TransientIOError,
)
from jobs.ledger.causes import FailureGroup
from jobs.ledger.pauses import Pause, Scope
from jobs.ledger.queries import Order
from jobs.ledger.records import BatchRecord, DriverRecord, Event, JobPage, JobRecord, SubmitResult, Work
from jobs.ledger.selection import ALL, Selection
from jobs.parity_report import ParityReport
from jobs.policy import FailurePolicy
from jobs.release import Release
from jobs.request import MergeRequest
from jobs.request_files.patterns import Listing
from jobs.request_files.reading import Origin, document_of, has_patterns, read_requests, read_text
from jobs.states import JobState

MEDIA_TYPES = {
    ".json": "application/json",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".jsonl": "application/jsonl",
    ".csv": "text/csv",
}
"""Of request files, by the ending of their names."""

_SECONDS = httpx2.Timeout(120.0, connect=10.0)
"""A submission of 100,000 requests takes a minute."""
_SHOWN = 200

_Answer = TypeVar("_Answer")


class HttpService:
    """A queue behind `mergefleet serve`.

    Args:
        url: `http://host:port` or `https://…`, with the path that a proxy puts before it, if there is one.
        token: that the server asks for; None where it asks for none. It goes into a header, and nowhere else.
        look: makes what patterns of request files are looked up in, on this machine; without it they are refused.
    """

    def __init__(self, url: str, token: str | None, look: Callable[[], Listing] | None = None) -> None:
        self._look = look
        self._url = url.rstrip("/")
        headers = {"Accept": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
        # No proxies or credentials of the environment: the token goes to this server alone.
        self._client = httpx2.Client(headers=headers, timeout=_SECONDS, trust_env=False, follow_redirects=False)

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def submit(self, requests: Sequence[MergeRequest], batch: str) -> SubmitResult:
        """Make jobs of requests; see `Intake`."""
        return self._submit(document_of(requests), ".json", batch, {"name": "requests"})

    def submit_file(self, path: Path, batch: str) -> SubmitResult:
        """Make jobs of the requests of a file; see `Intake`. Patterns are looked up here: paths are this machine's."""
        text, origin = read_text(path), Origin.of(path)
        if self._look is not None and has_patterns(text, origin):
            reading = read_requests(text, origin, listing=self._look())
            return replace(self.submit(reading.requests, batch), left_out=reading.left_out)
        where = {"name": str(path), "directory": str(path.absolute().parent)}
        return self._submit(text, origin.suffix, batch, where)

    def cancel(self, selection: Selection) -> tuple[str, ...]:
        """Cancel jobs; see `Steering`."""
        return self._post("/v1/cancel", wire.Changed, _choice(selection)).changed

    def retry(self, selection: Selection) -> tuple[str, ...]:
        """Queue jobs again; see `Steering`."""
        return self._post("/v1/retry", wire.Changed, _choice(selection)).changed

    def approve(self, selection: Selection, by: str) -> tuple[str, ...]:
        """Let jobs be published that wait for it; see `Steering`."""
        return self._post("/v1/approve", wire.Changed, _choice(selection) | {"by": by}).changed

    def reject(self, selection: Selection, by: str, reason: str) -> tuple[str, ...]:
        """Cancel jobs that wait for approval; see `Steering`."""
        return self._post("/v1/reject", wire.Changed, _choice(selection) | {"by": by, "reason": reason}).changed

    def pause(self, scope: Scope, name: str, by: str, reason: str) -> bool:
        """Keep jobs from being started; see `Steering`."""
        body = {"scope": scope, "name": name, "by": by, "reason": reason}
        return self._post("/v1/pause", wire.PauseAnswer, body).changed

    def resume(self, scope: Scope, name: str) -> tuple[Pause, ...]:
        """End the pauses of one thing; see `Steering`."""
        return self._post("/v1/resume", wire.Pauses, {"scope": scope, "name": name}).pauses

    def release_leases(self, driver: str) -> int:
        """Let the leases of a driver run out now; see `Steering`."""
        return self._post("/v1/release-leases", wire.Released, {"driver": driver}).released

    def jobs(
        self, selection: Selection = ALL, *, order: Order = "submitted", limit: int | None = None
    ) -> tuple[JobRecord, ...]:
        """Return jobs; see `Jobs`. More than 100 ids are asked for in pieces, each of which is in order."""
        found: list[JobRecord] = []
        for ids in _pieces(selection.ids):
            cursor = None
            while limit is None or len(found) < limit:
                some = wire.MAX_PAGE if limit is None else min(wire.MAX_PAGE, limit - len(found))
                page = self._page(selection, ids, order, some, cursor)
                found += page.jobs
                cursor = page.next_cursor
                if cursor is None:
                    break
        return tuple(found)

    def page(
        self, selection: Selection = ALL, *, order: Order = "submitted", limit: int = 100, cursor: str | None = None
    ) -> JobPage:
        """Return some jobs; see `Jobs`."""
        return self._page(selection, selection.ids or (), order, limit, cursor)

    def job(self, job_id: str) -> JobRecord:
        """Return a job; see `Jobs`."""
        return self._get(_path("/v1/jobs", job_id), JobRecord)

    def events(self, job_id: str, after: int = 0) -> tuple[Event, ...]:
        """Return what happened to a job; see `Jobs`."""
        return self._get(_path("/v1/jobs", job_id, "events"), wire.Events, {"after": after}).events

    def release(self, job_id: str) -> Release:
        """Return the release of a job; see `Jobs`."""
        return self._get(_path("/v1/jobs", job_id, "release"), Release)

    def report(self, job_id: str) -> ParityReport:
        """Return the parity report of a job; see `Jobs`."""
        return self._get(_path("/v1/jobs", job_id, "report"), ParityReport)

    def now(self) -> float:
        """Return the time on the queue's clock."""
        return self._counts(ALL).now

    def batches(self) -> tuple[BatchRecord, ...]:
        """Return all batches; see `Overview`."""
        return tuple(each.record() for each in self._get("/v1/batches", wire.Batches).batches)

    def batch(self, name: str) -> BatchRecord:
        """Return one batch; see `Overview`."""
        return self._get(_path("/v1/batches", name), wire.BatchAnswer).record()

    def counts(self, selection: Selection = ALL) -> dict[JobState, int]:
        """Return the number of jobs in each state; see `Overview`."""
        return dict(self._counts(selection).counts)

    def num_held(self, selection: Selection = ALL) -> dict[str, int]:
        """Return how many jobs each pause holds; see `Overview`."""
        return dict(self._counts(selection).held)

    def work(self, selection: Selection = ALL) -> tuple[Work, ...]:
        """Return how far the work on each base is; see `Overview`."""
        return self._get("/v1/work", wire.AllWork, _filter(selection)).work

    def failures(self, selection: Selection = ALL) -> tuple[FailureGroup, ...]:
        """Return failures by cause; see `Overview`."""
        return self._get("/v1/failures", wire.Failures, _filter(selection)).failures

    def pauses(self) -> tuple[Pause, ...]:
        """Return what is paused; see `Overview`."""
        return self._get("/v1/pauses", wire.Pauses).pauses

    def drivers(self) -> tuple[DriverRecord, ...]:
        """Return the drivers; see `Overview`."""
        return self._get("/v1/drivers", wire.Drivers).drivers

    def policy(self) -> FailurePolicy:
        """Return what follows each class of failure; see `Overview`."""
        return self._get("/v1/policy", FailurePolicy)

    def _counts(self, selection: Selection) -> wire.Counts:
        return self._get("/v1/counts", wire.Counts, _filter(selection))

    def _page(
        self, selection: Selection, ids: Collection[str], order: Order, limit: int, cursor: str | None
    ) -> JobPage:
        where = _filter(selection) | {"id": list(ids), "order": order, "limit": limit}
        return self._get("/v1/jobs", JobPage, where | ({} if cursor is None else {"cursor": cursor}))

    def _submit(self, text: str, suffix: str, batch: str, origin: Mapping[str, str]) -> SubmitResult:
        path = _path("/v1/batches", batch_name(batch, given=True))
        headers = {"Content-Type": MEDIA_TYPES[suffix]}
        return self._ask("POST", path, SubmitResult, params=origin, content=text.encode(), headers=headers)

    def _get(self, path: str, kind: type[_Answer], params: Mapping[str, Any] | None = None) -> _Answer:
        return self._ask("GET", path, kind, params=params or {})

    def _post(self, path: str, kind: type[_Answer], body: Mapping[str, Any]) -> _Answer:
        """Send a body as it is: the server says what is wrong with it."""
        headers = {"Content-Type": MEDIA_TYPES[".json"]}
        return self._ask("POST", path, kind, content=json.dumps(body).encode(), headers=headers)

    def _ask(self, method: str, path: str, kind: type[_Answer], **request: Any) -> _Answer:
        try:
            response = self._client.request(method, self._url + path, **request)
        except httpx2.InvalidURL as error:
            raise BadInputError(f"server {self._url}: expected an address such as http://host:port: {error}") from error
        except httpx2.HTTPError as error:
            words = str(error) or type(error).__name__
            raise TransientIOError(
                f"server {self._url} does not answer: {words}; is `mergefleet serve` running there (MERGEFLEET_SERVER)?"
            ) from error
        if response.is_success:
            try:
                return TypeAdapter(kind).validate_json(response.content)
            except ValidationError as error:
                raise InternalError(
                    f"server {self._url}{path}: expected an answer of this version's API, found "
                    f"{response.text[:_SHOWN]!r}; is it a mergefleet of another version?"
                ) from error
        raise self._error_of(response)

    def _error_of(self, response: httpx2.Response) -> MergefleetError:
        try:
            error = error_of(wire.ProblemDocument.model_validate_json(response.content))
        except ValidationError:
            words = f"server {self._url}: expected the API of `mergefleet serve`, found status {response.status_code}: "
            words += repr(response.text[:_SHOWN])
            # What a proxy answers when the server behind it does not.
            if response.status_code in (502, 503, 504):
                return TransientIOError(words)
            return BadInputError(words)
        if response.status_code == http.HTTPStatus.UNAUTHORIZED:
            return AuthError(f"server {self._url}: {error}")
        return error


def _path(parent: str, name: str, *below: str) -> str:
    """Return the address of one thing.

    Raises:
        NotFoundError: there is none of this name, as no address could hold it.
    """
    if name in ("", ".", "..") or "/" in name:
        raise NotFoundError(f"no such {'batch' if parent.endswith('batches') else 'job'}: {name}")
    return "/".join([parent, urllib.parse.quote(name, safe=""), *below])


def _choice(selection: Selection) -> dict[str, Any]:
    """Return a selection as it goes into a body.

    Raises:
        InvalidValueError: the name of a label cannot be told from its value.
    """
    if wrong := [name for name in selection.labels if not name or "=" in name]:
        raise InvalidValueError("names of labels without '='", repr(wrong[0]))
    return {"id": list(selection.ids or ()), **_filter(selection)}


def _filter(selection: Selection) -> dict[str, Any]:
    """Return the part of an address that says which jobs, but for their ids."""
    chosen = {
        "batch": selection.batch,
        "state": [each.value for each in selection.states or ()],
        "label": [f"{name}={value}" for name, value in selection.labels.items()],
        "failure": [each.value for each in selection.failures or ()],
        "since": selection.since,
        "unfinished_at": selection.unfinished_at,
    }
    return {name: value for name, value in chosen.items() if value not in (None, [])}


def _pieces(ids: Collection[str] | None) -> Iterator[Collection[str]]:
    """Yield ids in as many pieces as it takes to ask for them; one empty piece where they narrow nothing."""
    if ids is None:
        yield ()
        return
    known = list(dict.fromkeys(ids))
    for start in range(0, len(known), wire.MAX_IDS):
        yield known[start : start + wire.MAX_IDS]
