"""What a worker says about its work: values only, small, and safe to send between processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jobs.errors import FailureClass, MergefleetError, NotNowError
from jobs.kept import KeptWeight
from jobs.parity_report import ParitySummary, TensorCheck
from jobs.release import Release
from jobs.request import MergeRequest
from jobs.text import MAX_MESSAGE, shown
from workers.releases.sinks import Receipt, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """What a worker says when it starts."""

    host: str
    """Name of its machine."""
    fault: str | None = None
    """Why it cannot work; None when it can."""
    log: str | None = None
    """Name of the file on that machine that it logs to; None where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job failed."""

    failure_class: FailureClass
    message: str
    place: str | None = None
    """Whose fault it is, where many jobs depend on it (`jobs.places`)."""
    waits: bool = False
    """Whether nothing failed: others have what the job needs, and it waits for them."""

    @classmethod
    def of(cls, error: MergefleetError) -> "Failure":
        """Return the failure an error stands for."""
        message = shown(error, MAX_MESSAGE, lines=True)
        return cls(
            failure_class=error.failure_class,
            message=message,
            place=error.place,
            waits=isinstance(error, NotNowError),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a unit took."""

    bytes_read: int = 0
    """Of bases and adapters, by the merge; what was quantized is read once for that and not again."""
    bytes_written: int = 0
    bytes_uploaded: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: fetch, plan, resume, quantize, merge, upload, arithmetic, behaviour. Upload runs beside the others:
    what is told is how long the unit waited for it at the end."""

    def since(self, before: "Usage") -> "Usage":
        """Return what was taken after `before`."""
        return Usage(
            bytes_read=self.bytes_read - before.bytes_read,
            bytes_written=self.bytes_written - before.bytes_written,
            bytes_uploaded=self.bytes_uploaded - before.bytes_uploaded,
            seconds={stage: seconds - before.seconds.get(stage, 0.0) for stage, seconds in self.seconds.items()},
        )

    def plus(self, other: "Usage") -> "Usage":
        """Return what both took together."""
        stages = self.seconds | other.seconds
        return Usage(
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
            bytes_uploaded=self.bytes_uploaded + other.bytes_uploaded,
            seconds={stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages},
        )


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

    @property
    def is_staged(self) -> bool:
        """Whether it waits to be published."""
        return self.failure is None and self.release is None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitOutcome:
    """What became of a unit."""

    jobs: tuple[JobOutcome, ...]
    usage: Usage
    residents: tuple[str, ...]
    """Pass keys of the bases the worker holds now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Output shards of a pass that are written together."""

    shards: tuple[str, ...]
    """Their names; the same in every job that has them."""
    num_bytes: int
    """Of all jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedShards:
    """Some shards of one job: merged, checked and shipped."""

    receipts: tuple[Receipt, ...]
    checks: tuple[TensorCheck, ...]
    """Of every tensor in them."""
    wrong: tuple[str, ...]
    """What is wrong besides, about the files themselves or what was read of the adapter, a sentence each."""
    kept: tuple[KeptWeight, ...] = ()
    """Weights in them that are kept in more bits than the release's form has."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the shards."""
        return frozenset(receipt.artifact.path for receipt in self.receipts)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOpened:
    """A pass that several workers can work on."""

    ended: tuple[JobOutcome, ...]
    """Jobs that failed, or whose release was there already."""
    tickets: Mapping[str, Ticket]
    """What a worker needs to take part, for each of the other jobs."""
    pieces: tuple[Piece, ...]
    """What is left to merge."""
    bytes_total: int
    """What all calls together will tell as done."""
    usage: Usage
    resumed: Mapping[str, MergedShards] = field(default_factory=dict)
    """What dead attempts had finished, by job; the pieces are what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassWork:
    """What any worker needs to work on a pass that was opened."""

    pass_id: str
    name: str
    """Of this piece of work, for people."""
    requests: tuple[MergeRequest, ...]
    """Those of its jobs that are still wanted."""
    tickets: Mapping[str, Ticket]
    """By job."""
    finished: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Shards that are there already, by job: no piece of work touches them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsOutcome:
    """What became of some pieces of a pass."""

    merged: Mapping[str, MergedShards]
    """By job."""
    ended: tuple[JobOutcome, ...]
    """Jobs that failed."""
    usage: Usage
    residents: tuple[str, ...]
    """Pass keys of the bases the worker holds now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable:
    """A worker cannot take part in a pass; others may."""

    reason: str
    """It does not see the directory that a release is made in, or has not what it takes."""


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
    """By job: fetch, plan, resume, quantize, merge, verify, staged, publish; published or failed at the end."""
    bytes_done: int
    bytes_total: int
