"""Errors as problem documents (RFC 9457), and problem documents as the errors they were."""

import http
from collections.abc import Iterator, Mapping

from cluster.front.wire import ProblemDocument
from jobs.errors import (
    AuthError,
    InternalError,
    InvalidValueError,
    MergefleetError,
    NoCapacityError,
    NotFoundError,
    StoreMissingError,
    StoreUnusableError,
    TransientIOError,
)
from jobs.errors import BadInputError as BadInput
from jobs.request_files.problems import RequestFileError

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5
"""After which a client may ask again where the ledger did not answer."""

_STATUSES: tuple[tuple[type[MergefleetError], int], ...] = (
    (StoreUnusableError, 503),
    (StoreMissingError, 503),
    (TransientIOError, 503),
    (NoCapacityError, 503),
    (AuthError, 503),  # of the ledger; who asks is refused at the door
    (NotFoundError, 404),
    (BadInput, 400),
)
"""The first that fits."""


class RefusedError(Exception):
    """What was asked for cannot be answered, for a reason that HTTP has a status for.

    Args:
        status: of HTTP.
        error: what is wrong.
        headers: that the answer has.
    """

    def __init__(self, status: int, error: MergefleetError, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, error, headers)
        self.status = status
        self.error = error
        self.headers = dict(headers or {})


def status_of(error: MergefleetError) -> int:
    """Return the status of an answer that says what went wrong."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def document_of(error: MergefleetError, status: int) -> ProblemDocument:
    """Return an error as it goes over HTTP."""
    name = type(error).__name__ if type(error) in _KINDS.values() else "InternalError"
    value = error if isinstance(error, InvalidValueError) else None
    return ProblemDocument(
        type=f"urn:mergefleet:{error.failure_class.value}",
        title=http.HTTPStatus(status).phrase,
        status=status,
        detail=str(error),
        error=name,
        failure_class=error.failure_class,
        expected=None if value is None else value.expected,
        found=None if value is None else value.found,
        problems=error.problems if isinstance(error, RequestFileError) else None,
    )


def error_of(document: ProblemDocument) -> MergefleetError:
    """Return the error that a document tells of."""
    kind = _KINDS.get(document.error, InternalError)
    if kind is RequestFileError:
        return RequestFileError(document.problems or ())
    if issubclass(kind, InvalidValueError):
        return kind(document.expected or "", document.found or "")
    return kind(document.detail)


def _kinds(kind: type[MergefleetError]) -> Iterator[type[MergefleetError]]:
    yield kind
    for each in kind.__subclasses__():
        if each.__module__.startswith("jobs."):
            yield from _kinds(each)


_KINDS = {kind.__name__: kind for kind in _kinds(MergefleetError)}
"""Errors by name: those of `jobs`, which both ends have."""
