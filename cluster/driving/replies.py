"""What a pool tells its driver: answers of workers, and the loss of them."""

from dataclasses import dataclass

from workers.merging.outcomes import PassOpened, Progress, PublishOutcome, ShardsOutcome, UnitOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFinished:
    """`run_unit` or `finish_pass` returned."""

    worker: str
    outcome: UnitOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class PassBegun:
    """`open_pass` returned."""

    worker: str
    pass_id: str
    outcome: PassOpened


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsMerged:
    """`merge_shards` returned."""

    worker: str
    pass_id: str
    outcome: ShardsOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedDown:
    """A worker cannot take part in a pass: `merge_shards` or `finish_pass` did nothing."""

    worker: str
    pass_id: str
    reason: str


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
    pass_id: str | None = None
    """The pass the call was about; None for a unit of its own."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSeen:
    """How far a unit is."""

    worker: str
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """A worker died or stopped answering, and the unit it ran is lost. It is being replaced."""

    worker: str
    reason: str
    device_failed: bool = False
    """Whether its GPU failed at work, as the worker itself says."""
    out_of_memory: bool = False
    """Whether it was ended because the memory of its machine ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUnfit:
    """A worker did not start, or says that it cannot work.

    It has no jobs. Its place is filled again and again, with growing pauses; this is told once.
    """

    worker: str
    reason: str


PoolEvent = (
    UnitFinished
    | PassBegun
    | ShardsMerged
    | TurnedDown
    | PublishFinished
    | CallFailed
    | ProgressSeen
    | WorkerLost
    | WorkerUnfit
)
