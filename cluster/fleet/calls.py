"""Calls to workers, and what their answers mean to a driver."""

from dataclasses import dataclass
from typing import Any

from cluster.driving.replies import (
    PassBegun,
    PoolEvent,
    ProgressSeen,
    PublishFinished,
    ShardsMerged,
    TurnedDown,
    UnitFinished,
)
from workers.merging.outcomes import (
    PassOpened,
    Progress,
    PublishOutcome,
    ShardsOutcome,
    UnitOutcome,
    Unreachable,
)

WORK = frozenset({"run_unit", "open_pass", "merge_shards", "finish_pass", "publish", "leave", "discard"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call under way."""

    worker: str
    method: str
    job_id: str | None
    pass_id: str | None
    started_at: float

    @property
    def is_work(self) -> bool:
        """Whether the worker is not idle while it lasts."""
        return self.method in WORK


def event_of(call: Call, value: Any) -> PoolEvent | None:
    """Return what an answer tells a driver; None where it is no news to it."""
    event: PoolEvent | None = None
    match value:
        case UnitOutcome():
            event = UnitFinished(worker=call.worker, outcome=value)
        case PassOpened():
            assert call.pass_id is not None
            event = PassBegun(worker=call.worker, pass_id=call.pass_id, outcome=value)
        case ShardsOutcome():
            assert call.pass_id is not None
            event = ShardsMerged(worker=call.worker, pass_id=call.pass_id, outcome=value)
        case Unreachable():
            assert call.pass_id is not None
            event = TurnedDown(worker=call.worker, pass_id=call.pass_id, reason=value.reason)
        case PublishOutcome():
            event = PublishFinished(worker=call.worker, outcome=value)
        case Progress():
            event = ProgressSeen(worker=call.worker, progress=value)
    return event
