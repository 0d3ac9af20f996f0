"""What a pool tells its driver: answers of workers, and the loss of them."""

from dataclasses import dataclass

from workers.outcomes import Progress, PublishOutcome, UnitOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFinished:
    """`run_unit` returned."""

    worker: str
    outcome: UnitOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishFinished:
    """`publish` returned."""

    worker: str
    outcome: PublishOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed:
    """A call raised instead of returning: a fault of mergefleet, since workers return typed failures."""

    worker: str
    call: str
    job_id: str | None
    """The job the call was about; None for the whole unit."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSeen:
    """How far a unit is."""

    worker: str
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """A worker died or stopped answering, and whatever it ran is lost. It is being replaced."""

    worker: str
    reason: str


PoolEvent = UnitFinished | PublishFinished | CallFailed | ProgressSeen | WorkerLost
