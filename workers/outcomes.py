"""What a worker says about its work: values only, small, and safe to send between processes."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.errors import FailureClass, MergefleetError
from jobs.release import ParitySummary, Release


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker needs to know about its machine."""

    cache: Path
    """Fetched sources and quantized bases; may be shared by workers."""
    scratch: Path
    """Files on their way to a remote destination."""
    reports: Path
    """Parity reports, one directory for each job."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is any."""
    num_threads: int | None = None
    """Threads that compute; None for one on each core this process may use."""
    resident_bytes: int = 4 << 30
    """Budget of device memory for quantized bases kept between units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job failed."""

    failure_class: FailureClass
    retryable: bool
    message: str

    @classmethod
    def of(cls, error: MergefleetError) -> "Failure":
        """Return the failure an error stands for."""
        return cls(failure_class=error.failure_class, retryable=error.retryable, message=str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a unit took."""

    bytes_read: int = 0
    """Of bases and adapters, by the merge; what was quantized is read once for that and not again."""
    bytes_written: int = 0
    bytes_uploaded: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: fetch, plan, quantize, merge, upload, arithmetic, behaviour. Upload runs beside the others: what is
    told is how long the unit waited for it at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """What became of one job of a unit: failed, there already, or staged and ready to be published."""

    job_id: str
    merge_key: str | None = None
    failure: Failure | None = None
    release: Release | None = None
    """Set when the same release was there already: nothing is left to publish."""
    parity: ParitySummary | None = None
    report_path: Path | None = None
    """Directory of the parity report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitOutcome:
    """What became of a unit."""

    jobs: tuple[JobOutcome, ...]
    usage: Usage
    residents: tuple[str, ...]
    """Pass keys of the bases the worker holds now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOutcome:
    """What became of publishing one job."""

    job_id: str
    failure: Failure | None = None
    release: Release | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a unit is."""

    unit: str
    stages: dict[str, str]
    """By job: fetch, plan, quantize, merge, verify, staged, publish; published or failed at the end."""
    bytes_done: int
    bytes_total: int
