"""What a driver knows of its surroundings: the workers it gives work to, the metrics it tells, and the clock."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from cluster.driving.replies import PoolEvent
from cluster.driving.scheduler import WorkerView
from jobs.request import MergeRequest
from jobs.states import JobState
from workers.merging.outcomes import MergedShards, PassWork, PublishOutcome, UnitOutcome, Usage

Clock = Callable[[], float]
"""Seconds that only go forward."""


class Pool(Protocol):
    """The workers of one driver. One thread calls it; calls return at once, and events tell what came of them."""

    def views(self) -> tuple[WorkerView, ...]:
        """Return what the scheduler needs to know."""

    def run_unit(self, worker: str, name: str, requests: tuple[MergeRequest, ...]) -> None:
        """Start a unit on an idle worker; `UnitFinished` follows."""

    def open_pass(self, worker: str, pass_id: str, name: str, requests: tuple[MergeRequest, ...]) -> None:
        """Have a pass planned that several workers will work on; `PassBegun` follows."""

    def merge_shards(self, worker: str, work: PassWork, shards: frozenset[str]) -> None:
        """Have some pieces of a pass merged; `ShardsMerged` or `TurnedDown` follows."""

    def finish_pass(self, worker: str, work: PassWork, merged: Mapping[str, tuple[MergedShards, ...]]) -> None:
        """Have a pass finished that is merged; `UnitFinished` or `TurnedDown` follows."""

    def publish(self, worker: str, job_id: str, approved_by: str | None) -> None:
        """Have a staged job published, with the name of who approved it; `PublishFinished` follows."""

    def leave(self, worker: str, job_id: str) -> None:
        """Have a staged job let go of, and its finished shards left to the attempt that will publish it."""

    def discard(self, worker: str, job_id: str) -> None:
        """Have dropped what a job left."""

    def cancel(self, worker: str, job_ids: Iterable[str]) -> None:
        """Ask a worker to stop some of the jobs of the unit it is at; their outcomes say so."""

    def poll(self, timeout_seconds: float) -> tuple[PoolEvent, ...]:
        """Wait until something happens, at most `timeout_seconds`, and return what did.

        Raises:
            WorkerLostError: no worker of the fleet starts, tried again and again; the message has a reason.
        """


class Metrics(Protocol):
    """Where a driver tells its figures."""

    def observe(
        self, *, jobs: Mapping[JobState, int], num_waiting: int, num_in_flight: int, residents: Mapping[str, int]
    ) -> None:
        """Set the gauges.

        Args:
            jobs: how many there are in the store; a state that is not named has none.
            num_waiting: jobs held without a worker.
            num_in_flight: units under way.
            residents: worker that is up to the number of bases it holds.
        """

    def unit_finished(self, outcome: UnitOutcome) -> None:
        """Count a unit and its parity verdicts."""

    def used(self, usage: Usage) -> None:
        """Count bytes and seconds of a call."""

    def publish_finished(self, outcome: PublishOutcome) -> None:
        """Count what publishing took."""

    def settled(self, outcome: str) -> None:
        """Count one attempt: `published`, `cancelled`, `let_go`, or the class of its failure."""

    def worker_lost(self) -> None:
        """Count a death."""

    def worker_benched(self) -> None:
        """Count a worker that cannot work."""

    def paused(self, places: Collection[str]) -> None:
        """Say which places are paused."""

    def excused(self, failure: str) -> None:
        """Count an attempt that a fault of a place ended, by the class of the fault."""
