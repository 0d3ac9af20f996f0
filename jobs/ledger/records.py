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

    batch: str
    created: tuple[str, ...]
    unchanged: tuple[str, ...]
    """Jobs that were there already with the same content, in any state; they stay in the batch they are in."""
    left_out: tuple[str, ...] = ()
    """Folders that match a pattern of the file and hold no whole adapter yet, each with the reason; none where the
    requests came without patterns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A person's word that a release may be published."""

    by: str
    merge_key: str
    """Of the release that was approved; it is the word for no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of one driver to work on one job until the lease expires."""

    job_id: str
    request: MergeRequest
    token: int
    """Fencing token: grows with every claim of the job; every write names it."""
    attempts: int
    """Attempts that count so far, the one that this lease is for included."""
    worker_losses: int
    """Workers the job has cost so far, each while it was the only job there."""
    excused_losses: int
    """Workers it was lost with and was not charged with, as others were likely at fault."""
    driver_losses: int
    """Drivers that were lost in a row, each while it was at work."""
    excused_faults: int
    """Faults of places that it was not charged with."""
    suspect: bool
    """Whether it, or a job beside it, may have been what ended an attempt: it must not take other jobs with it."""
    share: str = ""
    """The share that it belongs to."""
    approval: Approval | None = None
    """What a person has said of the release that an earlier attempt made."""
    is_probe: bool = False
    """Whether it was sent ahead to find out whether a place works again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """Work on one job that starts now."""

    job_id: str
    token: int
    worker: str
    node: str | None
    """Machine of the worker, where it is known."""
    log: str | None = None
    """Name of the worker's log file on that machine, where it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What ended an attempt that does not count: a fault of a place, or that others had what it needs."""

    place: str | None
    """None where it only has to wait for others."""
    failure: FailureClass
    message: str
    delay_seconds: float | None = None
    """How long the job waits by itself; None where the place is paused, and all that need it wait for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as it stands. Times are seconds since 1970 on the store's clock."""

    id: str
    request: MergeRequest
    batch: str
    share: str
    state: JobState
    held_by: str
    """The pause that keeps a job that waits from being claimed; nothing where there is none."""
    attempts: int
    worker_losses: int
    owner: str | None
    """The driver that holds it, while the state is an active one."""
    token: int
    lease_expires_at: float | None
    not_before: float | None
    """When a job in RETRY_WAIT may be claimed."""
    merge_key: str | None
    worker: str | None
    """Worker of the last attempt."""
    node: str | None
    started_at: float | None
    """When the last attempt began."""
    stage: str | None
    """Stage, and bytes, of the last attempt."""
    bytes_done: int
    bytes_total: int
    failure_class: FailureClass | None
    """The last failure, until the job is published or retried."""
    failure_message: str | None
    approval: Approval | None
    release: Release | None
    report_path: str | None
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """Some jobs of a longer list."""

    jobs: tuple[JobRecord, ...]
    next_cursor: str | None
    """Asks for the next ones; None when these are the last."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """A batch as it stands: how many of its jobs are in each state."""

    name: str
    created_at: float
    counts: dict[JobState, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverRecord:
    """A driver that has worked on this ledger. Times are seconds since 1970 on the store's clock."""

    owner: str
    host: str
    pid: int
    started_at: float
    seen_at: float
    """When it last claimed or extended leases."""
    ended_at: float | None
    """When it ended in order; None while it works, and of one that was killed."""
    num_leases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How many jobs of one base are at the same point."""

    base: str
    state: JobState
    stage: str | None
    """Of the attempt, where there is one."""
    num_jobs: int
    num_planned: int
    """Those of which the bytes are known."""
    bytes_done: int
    bytes_total: int
