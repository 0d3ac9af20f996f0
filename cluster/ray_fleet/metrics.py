"""Every metric, with its name and labels. They appear as `ray_<name>` on the Prometheus endpoint of each node.

No label takes as many values as there are jobs. History is in the store: these are for the dashboard and for alarms.
"""

from collections.abc import Collection, Mapping

from jobs.errors import FailureClass
from jobs.states import JobState
from workers.merging.outcomes import PublishOutcome, UnitOutcome, Usage


class FleetMetrics:
    """What one driver tells about its fleet. Needs an open Ray session."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge  # noqa: PLC0415 - after the session: see `cluster/ray_fleet/session.py`

        self._jobs = Gauge("mergefleet_jobs", "Jobs in the store, by state.", tag_keys=("state",))
        self._queue_depth = Gauge("mergefleet_queue_depth", "Jobs this driver holds that no worker has yet.")
        self._units_in_flight = Gauge("mergefleet_units_in_flight", "Units that workers are at.")
        self._workers = Gauge("mergefleet_workers", "Workers that are up.")
        self._resident_bases = Gauge("mergefleet_resident_bases", "Bases held in memory.", tag_keys=("worker",))
        self._bytes = Counter(
            "mergefleet_bytes_total", "Bytes read, written and uploaded by merges.", tag_keys=("direction",)
        )
        self._stage_seconds = Counter(
            "mergefleet_stage_seconds_total", "Seconds workers spent, by stage.", tag_keys=("stage",)
        )
        self._units = Counter("mergefleet_units_total", "Units that ended with an outcome.")
        self._parity = Counter("mergefleet_parity_total", "Parity verdicts.", tag_keys=("result",))
        self._settled = Counter("mergefleet_settled_total", "Attempts settled, by what came of them.", ("outcome",))
        self._worker_deaths = Counter("mergefleet_worker_deaths_total", "Workers that died and were replaced.")

        self._paused = Gauge(
            "mergefleet_paused_places", "Places that are paused for a fault or by a person.", ("place",)
        )
        self._excused = Counter(
            "mergefleet_excused_total", "Attempts that a fault of a place ended, and that do not count.", ("failure",)
        )
        self._told_paused: set[str] = set()
        self._workers_benched = Counter(
            "mergefleet_workers_benched_total", "Workers that did not start or could not use their GPU."
        )

    def observe(
        self,
        *,
        jobs: Mapping[JobState, int],
        num_waiting: int,
        num_in_flight: int,
        residents: Mapping[str, int],
    ) -> None:
        """Set the gauges.

        Args:
            jobs: how many there are in the store; a state that is not named has none.
            num_waiting: jobs held without a worker.
            num_in_flight: units under way.
            residents: worker that is up to the number of bases it holds.
        """
        for state in JobState:
            self._jobs.set(jobs.get(state, 0), {"state": state.value})
        self._queue_depth.set(num_waiting)
        self._units_in_flight.set(num_in_flight)
        self._workers.set(len(residents))
        for worker, count in residents.items():
            self._resident_bases.set(count, {"worker": worker})

    def unit_finished(self, outcome: UnitOutcome) -> None:
        """Count a unit and its parity verdicts."""
        self._units.inc()
        for job in outcome.jobs:
            if job.failure is not None and job.failure.failure_class is FailureClass.PARITY_FAILED:
                self._parity.inc(1, {"result": "failed"})
            elif job.failure is None and job.release is None:
                self._parity.inc(1, {"result": "passed"})

    def used(self, usage: Usage) -> None:
        """Count bytes and seconds of a call."""
        for direction, count in (
            ("read", usage.bytes_read),
            ("written", usage.bytes_written),
            ("uploaded", usage.bytes_uploaded),
        ):
            self._count_bytes(direction, count)
        for stage, seconds in usage.seconds.items():
            self._count_seconds(stage, seconds)

    def publish_finished(self, outcome: PublishOutcome) -> None:
        """Count what publishing took."""
        self._count_seconds("publish", outcome.seconds)

    def settled(self, outcome: str) -> None:
        """Count one attempt: `published`, `cancelled`, `let_go`, or the class of its failure."""
        self._settled.inc(1, {"outcome": outcome})

    def worker_lost(self) -> None:
        """Count a death."""
        self._worker_deaths.inc()

    def worker_benched(self) -> None:
        """Count a worker that cannot work."""
        self._workers_benched.inc()

    def paused(self, places: Collection[str]) -> None:
        """Say which places are paused."""
        for place in self._told_paused - set(places):
            self._paused.set(0, {"place": place})
        self._told_paused |= set(places)
        for place in places:
            self._paused.set(1, {"place": place})

    def excused(self, failure: str) -> None:
        """Count an attempt that a fault of a place ended, by the class of the fault."""
        self._excused.inc(1, {"failure": failure})

    def _count_bytes(self, direction: str, count: int) -> None:
        if count > 0:  # a counter refuses to be raised by nothing
            self._bytes.inc(count, {"direction": direction})

    def _count_seconds(self, stage: str, seconds: float) -> None:
        if seconds > 0:
            self._stage_seconds.inc(seconds, {"stage": stage})
