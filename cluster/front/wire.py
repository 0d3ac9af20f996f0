"""What goes over HTTP: questions and answers that are not records of the ledger already. Both ends read them."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints

from jobs.errors import FailureClass
from jobs.frozen import Frozen, is_none
from jobs.ledger.causes import FailureGroup
from jobs.ledger.pauses import Pause, Scope
from jobs.ledger.queries import Order
from jobs.ledger.records import BatchRecord, DriverRecord, Event, Work
from jobs.ledger.selection import Selection
from jobs.request import MergeRequest
from jobs.request_files.problems import Problem
from jobs.states import JobState

MAX_PAGE = 500
"""Jobs in one answer."""
MAX_IDS = 100
"""Ids in one question: an address has its limits."""
MAX_LABELS = 16
"""Labels in one question."""
MAX_ADDRESS_BYTES = 1 << 20
"""Of an address, which all of these fit into, and of what comes before a body."""
MAX_CHOSEN = 100_000
"""Ids in one body."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
"""Text that any database takes."""
Words = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")]
Label = Annotated[str, StringConstraints(max_length=1024, pattern=r"^[^=\x00]+=[^\x00]*$")]
JobId = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00]*$")]
Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
"""Since 1970."""


class Filter(Frozen):
    """Jobs that meet all of these; what is not said selects all."""

    batch: Name | None = None
    state: tuple[JobState, ...] = ()
    """In one of these states."""
    label: Annotated[tuple[Label, ...], Field(max_length=MAX_LABELS)] = ()
    """With all of these labels, each as name=value."""
    failure: tuple[FailureClass, ...] = ()
    """Whose last failure is of one of these classes."""
    since: Seconds | None = None
    """That changed at this time or later, seconds since 1970."""
    unfinished_at: Seconds | None = None
    """That were not final at this time, or have changed since."""

    def selection(self, ids: tuple[str, ...] = ()) -> Selection:
        """Return it as the ledger takes it."""
        return Selection(
            ids=ids or None,
            batch=self.batch,
            states=self.state or None,
            labels=dict(each.split("=", 1) for each in self.label),
            failures=self.failure or None,
            since=self.since,
            unfinished_at=self.unfinished_at,
        )


class Page(Filter):
    """Some jobs of those that meet all of these."""

    id: Annotated[tuple[JobId, ...], Field(max_length=MAX_IDS)] = ()
    order: Order = "submitted"
    """By submission, by last change (newest first), or by priority (highest first)."""
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 100
    cursor: Annotated[str, StringConstraints(max_length=1000)] | None = None
    """The `next_cursor` of the page before."""


class Choice(Filter):
    """Jobs that are to be changed: something has to be said."""

    id: Annotated[tuple[Name, ...], Field(max_length=MAX_CHOSEN)] = ()


class ApprovalBody(Choice):
    """Jobs that may be published."""

    by: Name
    """Who says so; it is in the manifests."""


class RejectionBody(ApprovalBody):
    """Jobs that may not."""

    reason: Words = ""


class Submission(Frozen):
    """Where the text of requests comes from."""

    name: Words = "request"
    """What messages call it."""
    directory: Annotated[str, StringConstraints(max_length=4096, pattern=r"^/[^\x00]*$")] | None = None
    """What relative paths are taken from, absolute; without one they are refused."""


class Requests(Frozen):
    """Requests as JSON; `defaults` and `matrix` of request files may stand beside them."""

    requests: tuple[MergeRequest, ...]


class After(Frozen):
    """Events that come later."""

    after: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """The number of the last event that is known."""


class Since(Frozen):
    """Changes from a time on."""

    since: Seconds | None = None
    """Seconds since 1970; now, when nothing is said."""


class PauseBody(Frozen):
    """What is to be kept back."""

    scope: Scope
    name: Words = ""
    """Of the batch, the base (as requests have it) or the place; of the queue none."""
    by: Name = "api"
    """Who says so."""
    reason: Words = ""


class ResumeBody(Frozen):
    """What is to go on."""

    scope: Scope
    name: Words = ""


class DriverBody(Frozen):
    """A driver, as `GET /v1/drivers` names it."""

    driver: Name


class RequestCounts(Frozen):
    """How many requests of a batch are where, as batch APIs have it."""

    total: int
    completed: int
    failed: int
    cancelled: int


class BatchAnswer(Frozen):
    """A batch as it stands."""

    name: str
    created_at: float
    request_counts: RequestCounts
    counts: Mapping[JobState, int]
    """By state, zeros included."""

    @classmethod
    def of(cls, record: BatchRecord) -> Self:
        """Return the answer for a record."""
        counts = record.counts
        request_counts = RequestCounts(
            total=sum(counts.values()),
            completed=counts[JobState.PUBLISHED],
            failed=counts[JobState.FAILED] + counts[JobState.QUARANTINED],
            cancelled=counts[JobState.CANCELLED],
        )
        return cls(name=record.name, created_at=record.created_at, request_counts=request_counts, counts=counts)

    def record(self) -> BatchRecord:
        """Return it as the ledger has it."""
        return BatchRecord(name=self.name, created_at=self.created_at, counts=dict(self.counts))


class Batches(Frozen):
    """All batches, oldest first."""

    batches: tuple[BatchAnswer, ...]


class Events(Frozen):
    """What happened to a job, oldest first."""

    events: tuple[Event, ...]


class Counts(Frozen):
    """How many jobs are in each state, and how many of those that wait are held by which pause."""

    now: float
    """The time on the queue's clock, seconds since 1970."""
    counts: Mapping[JobState, int]
    held: Mapping[str, int]


class AllWork(Frozen):
    """How far the work on each base is."""

    work: tuple[Work, ...]


class Failures(Frozen):
    """Failures by cause, the most frequent first."""

    failures: tuple[FailureGroup, ...]


class Pauses(Frozen):
    """What is paused, oldest first; after `resume`, what was."""

    pauses: tuple[Pause, ...]


class Drivers(Frozen):
    """The drivers that work, or hold leases."""

    drivers: tuple[DriverRecord, ...]


class Changed(Frozen):
    """Ids of the jobs that were changed."""

    changed: tuple[str, ...]


class PauseAnswer(Frozen):
    """Whether no person had paused it before."""

    changed: bool


class Released(Frozen):
    """How many leases ended."""

    released: int


class Health(Frozen):
    """The ledger answers."""

    status: Literal["ok"] = "ok"


class ProblemDocument(Frozen):
    """What went wrong (RFC 9457), with the class of the error as `jobs/errors.py` has it."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    """Name of its class."""
    failure_class: FailureClass
    expected: str | None = Field(default=None, exclude_if=is_none)
    """Of one wrong value."""
    found: str | None = Field(default=None, exclude_if=is_none)
    problems: tuple[Problem, ...] | None = Field(default=None, exclude_if=is_none)
    """Every mistake in a request file."""
