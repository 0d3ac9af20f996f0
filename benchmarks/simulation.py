"""Workers that spend modelled time instead of moving tensors, for a real pool.

The clock is that of the machine, so whatever the driver, the pool and the store take is taken; when all wait for a
worker, it jumps to the moment at which the next one answers.
"""

import contextlib
import heapq
import itertools
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.fleet.actors import ActorGoneError
from cluster.fleet.crews import Crew
from cluster.fleet.in_memory import InMemoryActors
from cluster.fleet.pool import WorkerPool
from cluster.settings import Settings
from jobs.parity_report import ParitySummary
from jobs.release import Artifact, Manifest, Release
from jobs.request import MergeRequest, QuantizationOptions
from workers.merging.outcomes import (
    JobOutcome,
    MergedShards,
    PassOpened,
    PassWork,
    Piece,
    Progress,
    PublishOutcome,
    Readiness,
    ShardsOutcome,
    UnitOutcome,
    Usage,
)
from workers.releases.sinks import Ticket

_GB = 1e9
_SHARD_GIGABYTES = 5.0
"""What `save_pretrained` wrote for years."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What work takes on one worker: bandwidths in GB of 16-bit weights a second, times in seconds."""

    load: float = 1.0
    """A base that the worker does not hold, from the node's cache to where it is merged."""
    read: float = 8.0
    """The base, once for each pass."""
    write: float = 2.0
    """One adapter's output: merged, hashed, written."""
    check: float = 4.0
    """One adapter's arithmetic parity."""
    seconds_per_unit: float = 1.0
    seconds_per_job: float = 0.5
    seconds_to_publish: float = 0.5
    seconds_to_start: float = 20.0
    """A worker in the place of one that died."""
    num_resident: int = 2
    """Bases a worker holds."""

    def load_seconds(self, base_bytes: float) -> float:
        """Return what it takes to get hold of a base."""
        return base_bytes / _GB / self.load

    def pass_seconds(self, base_bytes: float) -> float:
        """Return what a pass takes, however many jobs it has."""
        return self.seconds_per_unit + base_bytes / _GB / self.read

    def job_seconds(self, base_bytes: float) -> float:
        """Return what each job takes, publishing included."""
        return self.seconds_per_job + self.merge_seconds(base_bytes) + self.seconds_to_publish

    def merge_seconds(self, num_bytes: float) -> float:
        """Return what so much of one adapter's output takes."""
        return num_bytes / _GB / self.write + num_bytes / _GB / self.check


class Clock:
    """Seconds that pass as they do, and jump where nothing would happen."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return time.perf_counter() + self._skipped

    def skip(self, seconds: float) -> None:
        """Let time pass."""
        self._skipped += max(0.0, seconds)


class SimulatedActor:
    """A worker that works off its calls one after the other."""

    node = None

    def __init__(self, fleet: "SimulatedFleet") -> None:
        self._fleet = fleet
        self._residents: OrderedDict[str, None] = OrderedDict()
        self._free_at = 0.0
        self._unit: tuple[str, tuple[str, ...], float, float] = ("", (), 0.0, 0.0)
        """Name, jobs, begin and end of what it was given last."""
        self._gone: ActorGoneError | None = None
        self._pending: dict[Future[Any], tuple[float, float]] = {}
        """What it has yet to answer, with its begin and its end."""

    def call(self, method: str, *arguments: Any, task_name: str) -> Future[Any]:  # noqa: ARG002 - there is no dashboard
        """Take a call, and have it answered when its time has come."""
        with self._fleet.apart():
            future: Future[Any] = Future()
            if self._gone is not None:
                future.set_exception(self._gone)
            elif method == "progress":
                future.set_result(self._progress())
            else:
                seconds, value = getattr(self, method)(*arguments)
                self._answer_in(seconds, future, value)
            return future

    def kill(self) -> None:
        """End it: nothing it was at is answered."""
        self.die("it was killed", self._fleet.now())

    def die(self, reason: str, when: float) -> None:
        """End it, and say so to all who wait for it."""
        self._gone = ActorGoneError(reason)
        for future, (begin, end) in self._pending.items():
            self._fleet.busy_seconds += max(0.0, min(when, end) - begin)
            future.set_exception(self._gone)
        self._pending.clear()

    def end(self, future: Future[Any], value: object) -> None:
        """Answer, if it still lives."""
        if future in self._pending:
            begin, end = self._pending.pop(future)
            self._fleet.busy_seconds += end - begin
            future.set_result(value)

    def _answer_in(self, seconds: float, future: Future[Any], value: object) -> None:
        now = self._fleet.now()
        begin = max(now, self._free_at)
        if begin + seconds <= now:
            future.set_result(value)
            return
        self._free_at = begin + seconds
        self._pending[future] = begin, self._free_at
        self._fleet.plan(self._free_at, lambda _: self.end(future, value))

    def ready(self) -> tuple[float, Readiness]:
        """Come up: the first ones were there before the simulation began."""
        return self._fleet.seconds_to_start, Readiness(host="simulated")

    def run_unit(self, name: str, requests: tuple[MergeRequest, ...]) -> tuple[float, UnitOutcome]:
        """Do a unit."""
        costs, size = self._fleet.costs, self._fleet.size_of(requests)
        seconds = costs.pass_seconds(size) + len(requests) * (costs.job_seconds(size) - costs.seconds_to_publish)
        key = requests[0].pass_key()
        if key not in self._residents:
            seconds += costs.load_seconds(size)
            self._fleet.num_loads += 1
        self._residents[key] = None
        self._residents.move_to_end(key)
        if len(self._residents) > costs.num_resident:
            self._residents.popitem(last=False)
        self._fleet.num_units += 1
        self._note(name, requests, seconds)
        self._merge(requests, seconds)
        return seconds, self._outcome(requests)

    def _merge(self, requests: tuple[MergeRequest, ...], seconds: float) -> None:
        """Die in the middle of it, where a job is poisonous."""
        if any(request.id in self._fleet.poisonous for request in requests):
            self._fleet.plan(self._fleet.now() + seconds / 2, lambda when: self._fleet.kill(self, when))

    def _note(self, name: str, requests: tuple[MergeRequest, ...], seconds: float) -> None:
        now = self._fleet.now()
        self._unit = name, tuple(request.id for request in requests), now, now + seconds

    def _outcome(self, requests: tuple[MergeRequest, ...]) -> UnitOutcome:
        outcomes = tuple(JobOutcome(job_id=request.id, merge_key="a" * 64) for request in requests)
        return UnitOutcome(jobs=outcomes, usage=Usage(), residents=tuple(self._residents))

    def open_pass(self, pass_id: str, name: str, requests: tuple[MergeRequest, ...]) -> tuple[float, PassOpened]:
        """Plan a pass that several workers will work on."""
        self._fleet.num_units += 1
        size = self._fleet.size_of(requests)
        num_pieces = _num_shards(size)
        pieces = tuple(
            Piece(shards=(f"model-{n}.safetensors",), num_bytes=int(len(requests) * size / num_pieces))
            for n in range(num_pieces)
        )
        ticket = Ticket(directory=Path("/staging"), attempt=pass_id, merge_key="a" * 64)
        tickets = {request.id: ticket for request in requests}
        opened = PassOpened(ended=(), tickets=tickets, pieces=pieces, bytes_total=2 * int(size), usage=Usage())
        self._note(name, requests, self._fleet.costs.seconds_per_unit)
        return self._fleet.costs.seconds_per_unit, opened

    def merge_shards(self, work: PassWork, shards: frozenset[str]) -> tuple[float, ShardsOutcome]:
        """Merge some pieces of a pass."""
        costs, size = self._fleet.costs, self._fleet.size_of(work.requests)
        part = len(shards) / _num_shards(size) * size
        seconds = part / _GB / costs.read
        seconds += len(work.requests) * costs.merge_seconds(part)
        if work.requests[0].pass_key() not in self._residents:
            seconds += costs.load_seconds(part)
        merged = MergedShards(receipts=(), checks=(), wrong=())
        outcome = ShardsOutcome(
            merged={request.id: merged for request in work.requests},
            ended=(),
            usage=Usage(),
            residents=tuple(self._residents),
        )
        self._note(work.name, work.requests, seconds)
        self._merge(work.requests, seconds)
        return seconds, outcome

    def finish_pass(self, work: PassWork, _merged: Mapping[str, tuple[MergedShards, ...]]) -> tuple[float, UnitOutcome]:
        """Finish a pass that is merged."""
        seconds = len(work.requests) * self._fleet.costs.seconds_per_job
        self._note(work.name, work.requests, seconds)
        return seconds, self._outcome(work.requests)

    def publish(self, job_id: str, _approved_by: str | None) -> tuple[float, PublishOutcome]:
        """Publish a job."""
        seconds = self._fleet.costs.seconds_to_publish
        return seconds, PublishOutcome(job_id=job_id, release=_release(job_id), seconds=seconds)

    def discard(self, _job_id: str) -> tuple[float, None]:
        """Take no time: what a job left is gone."""
        return 0.0, None

    def cancel(self, _job_ids: frozenset[str]) -> tuple[float, None]:
        """Take no time: nobody cancels in a simulation but those who helped with a job that has ended."""
        return 0.0, None

    def residents(self) -> tuple[float, tuple[str, ...]]:
        """Take no time."""
        return 0.0, tuple(self._residents)

    def _progress(self) -> Progress:
        name, jobs, begin, end = self._unit
        share = min(1.0, (self._fleet.now() - begin) / (end - begin)) if end > begin else 1.0
        stage = "plan" if share < 0.05 else "merge" if share < 0.7 else "verify"
        return Progress(unit=name, stages=dict.fromkeys(jobs, stage), bytes_done=int(share * 1e9), bytes_total=int(1e9))


class SimulatedFleet:
    """Starts simulated workers, and lets time pass for them: what `InMemoryActors` takes."""

    def __init__(
        self,
        base_bytes: Mapping[str, float],
        costs: Costs,
        clock: Clock,
        *,
        hours_between_deaths: float | None,
        rng: random.Random,
        poisonous: Collection[str] = (),
    ) -> None:
        """Take what work costs.

        Args:
            base_bytes: size of each base, by its location.
            costs: what work takes.
            clock: that the driver and the pool have, too.
            hours_between_deaths: mean time a worker lives; None for ever.
            rng: source of the deaths.
            poisonous: jobs that kill the worker that merges them.
        """
        self.costs = costs
        self.poisonous = poisonous
        self.now = clock
        self.seconds_to_start = 0.0
        """Of the next worker that starts; those of the beginning are up at once."""
        self.num_loads = 0
        self.num_units = 0
        self.num_deaths = 0
        self.busy_seconds = 0.0
        """Of all workers, work that a death undid included."""
        self.cpu_seconds = 0.0
        """CPU time of the simulation itself, which is not the driver's."""
        self._base_bytes = base_bytes
        self._clock = clock
        self._hours_between_deaths = hours_between_deaths
        self._rng = rng
        self._numbers = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        """When, number, and what happens then."""

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Count the time that this takes as the simulation's own."""
        begin = time.process_time()
        yield
        self.cpu_seconds += time.process_time() - begin

    def size_of(self, requests: tuple[MergeRequest, ...]) -> float:
        """Return the bytes of the base of some requests."""
        return self._base_bytes[str(requests[0].base)]

    def start(self, _name: str, _crew: Crew) -> SimulatedActor:
        """Start a worker."""
        actor = SimulatedActor(self)
        if self._hours_between_deaths is not None:
            life = self._rng.expovariate(1 / (3600 * self._hours_between_deaths))
            self.plan(self.now() + self.seconds_to_start + life, lambda when: self.kill(actor, when))
        return actor

    def kill(self, actor: SimulatedActor, when: float) -> None:
        """Let a worker die."""
        self.num_deaths += 1
        actor.die("it died in the simulation", when)

    def plan(self, when: float, happens: Callable[[float], None]) -> None:
        """Have something happen when its time has come."""
        heapq.heappush(self._agenda, (when, next(self._numbers), happens))

    def wait(self, futures: Sequence[Future[Any]], timeout_seconds: float, *, for_all: bool) -> None:
        """Let time pass until something happens, at most so long."""
        assert not for_all
        with self.apart():
            if not any(future.done() for future in futures):
                wake = min([self.now() + timeout_seconds, *(when for when, _, _ in self._agenda[:1])])
                self._clock.skip(wake - self.now())
            while self._agenda and self._agenda[0][0] <= self.now():
                when, _, happens = heapq.heappop(self._agenda)
                happens(when)


def open_pool(fleet: SimulatedFleet, num_workers: int, settings: Settings, clock: Clock) -> WorkerPool:
    """Return the real pool of so many simulated workers, which are up."""
    pool = WorkerPool(
        InMemoryActors(fleet.start, fleet.wait),
        [Crew(num_workers=num_workers, device="cpu", num_threads=1)],
        ping_seconds=settings.poll_seconds,
        unresponsive_seconds=settings.unresponsive_seconds,
        clock=clock,
    )
    pool.poll(0.0)
    fleet.seconds_to_start = fleet.costs.seconds_to_start  # of those that follow
    return pool


def _num_shards(size: float) -> int:
    return max(1, round(size / _GB / _SHARD_GIGABYTES))


class SimulatedMetrics:
    """Takes what a driver tells `FleetMetrics`, and does nothing with it: there is no Ray to tell."""

    def observe(self, **_: object) -> None:
        """Set no gauges."""

    def unit_finished(self, _: UnitOutcome) -> None:
        """Count nothing."""

    def used(self, _: Usage) -> None:
        """Count nothing."""

    def publish_finished(self, _: PublishOutcome) -> None:
        """Count nothing."""

    def settled(self, _: str) -> None:
        """Count nothing."""

    def worker_lost(self) -> None:
        """Count nothing."""

    def worker_benched(self) -> None:
        """Count nothing."""

    def paused(self, _places: Collection[str]) -> None:
        """Nothing."""

    def excused(self, _failure: str) -> None:
        """Nothing."""


def _release(job_id: str) -> Release:
    """Return a release of a merged checkpoint of four shards, for the ledger."""
    files = tuple(
        Artifact(path=f"model-0000{n}-of-00004.safetensors", num_bytes=4_000_000_000, sha256="d" * 64)
        for n in range(1, 5)
    )
    manifest = Manifest(
        merge_key="a" * 64,
        request_id=job_id,
        base="/bases/simulated",
        base_digest="b" * 64,
        adapter=f"/adapters/{job_id}",
        adapter_digest="c" * 64,
        base_quantization="nf4",
        quantization_options=QuantizationOptions(),
        dtype=None,
        parity=ParitySummary(
            level="arithmetic",
            num_tensors=291,
            num_changed_tensors=224,
            rounding_excess=1.0,
            min_survival=1.0,
            mean_kl=None,
            top1_agreement=None,
        ),
        files=files,
        versions={},
    )
    return Release(location=f"/releases/{job_id}", manifest=manifest, manifest_sha256="e" * 64, created=True)
