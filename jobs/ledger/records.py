"""What the ledger says of a job: leases for drivers, records and events for people."""

from dataclasses import dataclass

from pydantic import JsonValue

from jobs.errors import FailureClass
from jobs.release import Release
from jobs.request import MergeRequest
from jobs.states import JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitResult:
    """What a submission changed; ids in the order of the requests."""

    created: tuple[str, ...]
    unchanged: tuple[str, ...]
    """Jobs that were there already with the same content, in any state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of one driver to work on one job until the lease expires."""

    job_id: str
    request: MergeRequest
    token: int
    """Fencing token: grows with every claim of the job; every write names it."""
    attempts: int
    """Attempts so far, this one included."""
    worker_losses: int
    """Workers the job has cost so far, each while it was the only job there."""
    excused_losses: int
    """Workers and drivers it was lost with and was not charged with, as others were likely at fault."""
    suspect: bool
    """Whether it, or a job beside it, may have been what ended an attempt: it must not take other jobs with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as it stands. Times are seconds since 1970 on the store's clock."""

    id: str
    request: MergeRequest
    state: JobState
    attempts: int
    worker_losses: int
    owner: str | None
    """The driver that holds it, while the state is an active one."""
    token: int
    lease_expires_at: float | None
    not_before: float | None
    """When a job in RETRY_WAIT may be claimed."""
    merge_key: str | None
    stage: str | None
    """Stage, and bytes, of the last attempt."""
    bytes_done: int
    bytes_total: int
    failure_class: FailureClass | None
    """The last failure, until the job is published or retried."""
    failure_message: str | None
    release: Release | None
    report_path: str | None
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step in the life of a job."""

    job_id: str
    sequence: int
    """Counted from 1 for each job, without gaps."""
    at: float
    state: JobState
    """The state it entered."""
    detail: dict[str, JsonValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressReport:
    """How far the work on one job is, as its driver last heard."""

    job_id: str
    token: int
    """Of the driver's lease."""
    stage: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A release that is visible, for the ledger."""

    job_id: str
    token: int
    """Of the driver's lease."""
    release: Release
    report_path: str | None
    """Parity report of the attempt."""
