"""Fair shares: whose job goes next. Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996), each job of cost 1.

Every share has a virtual time, which grows by 1/weight with each job it is given; the one that is least ahead goes
next. A share that was idle starts at the time of the share that was last given a job: it gains no credit by waiting.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareRules:
    """What drivers are set to."""

    label: str = ""
    """The label whose values are the shares; without one, all jobs are one share."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """By share; 1 of those that are not named."""
    quotas: Mapping[str, int] = field(default_factory=dict)
    """By share, how many of its jobs may be at work at one time; no limit for those that are not named."""


@dataclass(slots=True)
class Turns(Generic[_Item]):
    """Takes items from shares in turn."""

    rules: ShareRules
    virtual_times: dict[str, float]
    """By share; those that were never given a job are missing."""
    clock: float
    """Virtual time of the share that was last given a job."""
    at_work: dict[str, int]
    """By share, how many of its jobs are at work."""
    changed: set[str] = field(default_factory=set)
    """Shares whose virtual time has changed."""

    def take(self, queues: Mapping[str, Iterator[_Item]], limit: int) -> list[_Item]:
        """Take up to `limit` items.

        Args:
            queues: by share, its items in their order.
            limit: how many.
        """
        taken: list[_Item] = []
        open_shares = {share for share in queues if self._has_room(share)}
        while open_shares and len(taken) < limit:
            share = min(open_shares, key=lambda name: (self._start(name), name))
            item = next(queues[share], None)
            if item is None:
                open_shares.remove(share)
                continue
            taken.append(item)
            self.clock = self._start(share)
            self.virtual_times[share] = self.clock + 1.0 / self.rules.weights.get(share, 1.0)
            self.changed.add(share)
            self.at_work[share] = self.at_work.get(share, 0) + 1
            if not self._has_room(share):
                open_shares.remove(share)
        return taken

    def _start(self, share: str) -> float:
        return max(self.clock, self.virtual_times.get(share, 0.0))

    def _has_room(self, share: str) -> bool:
        quota = self.rules.quotas.get(share)
        return quota is None or self.at_work.get(share, 0) < quota
