"""A fleet of workers that spend modelled time instead of moving tensors, behind the interface of `WorkerPool`.

The clock is that of the machine, so whatever the driver and the store take is taken; when all wait for a worker, it
jumps to the moment at which the next one answers.
"""

import functools
import heapq
import itertools
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from cluster.driving.replies import (
    PassBegun,
    PoolEvent,
    ProgressSeen,
    PublishFinished,
    ShardsMerged,
    UnitFinished,
    WorkerLost,
)
from cluster.driving.scheduler import WorkerView
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


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _apart(method: Callable[Concatenate["SimulatedPool", _Parameters], _Result]) -> Callable[..., _Result]:
    """Count a method's time as the simulation's own, not the driver's that calls it."""

    @functools.wraps(method)
    def counted(self: "SimulatedPool", *arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        begin = time.process_time()
        try:
            return method(self, *arguments, **options)
        finally:
            self.cpu_seconds += time.process_time() - begin

    return counted


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


@dataclass(slots=True)
class _Worker:
    name: str
    residents: OrderedDict[str, None] = field(default_factory=OrderedDict)
    up_at: float = 0.0
    unit: str | None = None
    jobs: tuple[str, ...] = ()
    started_at: float = 0.0
    ends_at: float = 0.0
    publishing: set[str] = field(default_factory=set)
    life: int = 0
    """Counts deaths: what a former life was at does not end any more."""
    busy_since: float | None = None

    @property
    def busy(self) -> bool:
        return self.unit is not None or bool(self.publishing)


class SimulatedPool:
    """The workers of one driver."""

    def __init__(
        self,
        num_workers: int,
        base_bytes: Mapping[str, float],
        costs: Costs,
        clock: Clock,
        *,
        ping_seconds: float,
        hours_between_deaths: float | None,
        rng: random.Random,
    ) -> None:
        """Start the workers.

        Args:
            num_workers: how many.
            base_bytes: size of each base, by its location.
            costs: what work takes.
            clock: that the driver has, too.
            ping_seconds: how often a busy worker tells its progress.
            hours_between_deaths: mean time a worker lives; None for ever.
            rng: source of the deaths.
        """
        self._workers = {name: _Worker(name) for name in (f"merge-worker-{n}" for n in range(num_workers))}
        self._base_bytes = base_bytes
        self._costs = costs
        self._clock = clock
        self._ping_seconds = ping_seconds
        self._hours_between_deaths = hours_between_deaths
        self._rng = rng
        self._numbers = itertools.count()
        self._answers: dict[str, PoolEvent] = {}
        """What each worker will say when it is done."""
        self._agenda: list[tuple[float, int, str, int, str, str]] = []
        """When, number, worker, its life, what, and of which job."""
        self.num_loads = 0
        self.num_units = 0
        self.num_deaths = 0
        self.cpu_seconds = 0.0
        """CPU time of the simulation itself."""
        self.busy_seconds = 0.0
        """Of all workers, work that a death undid included."""
        self._pinged_at = clock()
        for worker in self._workers.values():
            self._plan_death(worker, self._pinged_at)

    @_apart
    def views(self) -> tuple[WorkerView, ...]:
        """Return what the scheduler needs to know."""
        now = self._clock()
        return tuple(
            WorkerView(
                name=worker.name,
                idle=not worker.busy and worker.up_at <= now,
                residents=frozenset(worker.residents),
            )
            for worker in self._workers.values()
        )

    @_apart
    def run_unit(self, worker: str, name: str, requests: tuple[MergeRequest, ...]) -> None:
        """Start a unit."""
        chosen = self._workers[worker]
        size = self._base_bytes[str(requests[0].base)]
        key = requests[0].pass_key()
        seconds = self._costs.pass_seconds(size)
        seconds += len(requests) * (self._costs.job_seconds(size) - self._costs.seconds_to_publish)
        if key not in chosen.residents:
            seconds += self._costs.load_seconds(size)
            self.num_loads += 1
        chosen.residents[key] = None
        chosen.residents.move_to_end(key)
        if len(chosen.residents) > self._costs.num_resident:
            chosen.residents.popitem(last=False)
        self.num_units += 1
        self._start(worker, name, requests, seconds)
        self._answers[worker] = self._finished(chosen)

    def _start(self, worker: str, name: str, requests: tuple[MergeRequest, ...], seconds: float) -> None:
        chosen = self._workers[worker]
        chosen.unit, chosen.jobs = name, tuple(request.id for request in requests)
        chosen.started_at = self._clock()
        chosen.ends_at = chosen.started_at + seconds
        self._begin_work(chosen)
        self._plan(chosen.ends_at, chosen, "unit")

    def _finished(self, worker: _Worker) -> UnitFinished:
        outcomes = tuple(JobOutcome(job_id=job, merge_key="a" * 64) for job in worker.jobs)
        outcome = UnitOutcome(jobs=outcomes, usage=Usage(), residents=tuple(worker.residents))
        return UnitFinished(worker=worker.name, outcome=outcome)

    @_apart
    def open_pass(self, worker: str, pass_id: str, name: str, requests: tuple[MergeRequest, ...]) -> None:
        """Have a pass planned that several workers will work on."""
        self.num_units += 1
        size = self._base_bytes[str(requests[0].base)]
        num_pieces = max(1, round(size / _GB / _SHARD_GIGABYTES))
        pieces = tuple(
            Piece(shards=(f"model-{n}.safetensors",), num_bytes=int(len(requests) * size / num_pieces))
            for n in range(num_pieces)
        )
        ticket = Ticket(directory=Path("/staging"), attempt=pass_id, merge_key="a" * 64)
        tickets = {request.id: ticket for request in requests}
        opened = PassOpened(ended=(), tickets=tickets, pieces=pieces, bytes_total=2 * int(size), usage=Usage())
        self._start(worker, name, requests, self._costs.seconds_per_unit)
        self._answers[worker] = PassBegun(worker=worker, pass_id=pass_id, outcome=opened)

    @_apart
    def merge_shards(self, worker: str, work: PassWork, shards: frozenset[str]) -> None:
        """Have some pieces of a pass merged."""
        size = self._base_bytes[str(work.requests[0].base)]
        part = len(shards) / max(1, round(size / _GB / _SHARD_GIGABYTES)) * size
        seconds = part / _GB / self._costs.read
        seconds += len(work.requests) * self._costs.merge_seconds(part)
        if work.requests[0].pass_key() not in self._workers[worker].residents:
            seconds += self._costs.load_seconds(part)
        merged = MergedShards(receipts=(), checks=(), wrong=())
        outcome = ShardsOutcome(
            merged={request.id: merged for request in work.requests},
            ended=(),
            usage=Usage(),
            residents=tuple(self._workers[worker].residents),
        )
        self._start(worker, work.name, work.requests, seconds)
        self._answers[worker] = ShardsMerged(worker=worker, pass_id=work.pass_id, outcome=outcome)

    @_apart
    def finish_pass(self, worker: str, work: PassWork, _merged: Mapping[str, tuple[MergedShards, ...]]) -> None:
        """Have a pass finished that is merged."""
        self._start(worker, work.name, work.requests, len(work.requests) * self._costs.seconds_per_job)
        self._answers[worker] = self._finished(self._workers[worker])

    @_apart
    def publish(self, worker: str, job_id: str) -> None:
        """Have a staged job published."""
        chosen = self._workers[worker]
        chosen.publishing.add(job_id)
        self._begin_work(chosen)
        # One after the other, as an actor's calls are.
        self._plan(self._clock() + len(chosen.publishing) * self._costs.seconds_to_publish, chosen, "publish", job_id)

    def discard(self, worker: str, job_id: str) -> None:
        """Take no time: what a job left is gone."""

    def cancel(self, worker: str, job_ids: Iterable[str]) -> None:
        """Take no time: nobody cancels in a simulation but those who helped with a job that has ended."""

    @_apart
    def poll(self, timeout_seconds: float) -> tuple[PoolEvent, ...]:
        """Let time pass until something happens, at most `timeout_seconds`, and return what did."""
        now = self._clock()
        wake = now + timeout_seconds
        wake = min(wake, self._pinged_at + self._ping_seconds)
        if self._agenda:
            wake = min(wake, self._agenda[0][0])
        wake = min([wake, *(worker.up_at for worker in self._workers.values() if worker.up_at > now)])
        self._clock.skip(wake - now)
        events: list[PoolEvent] = []
        if self._clock() >= self._pinged_at + self._ping_seconds:
            self._pinged_at = self._clock()
            at_work = [worker for worker in self._workers.values() if worker.unit is not None]
            events += [ProgressSeen(worker=each.name, progress=self._progress(each)) for each in at_work]
        while self._agenda and self._agenda[0][0] <= self._clock():
            when, _, name, life, what, job_id = heapq.heappop(self._agenda)
            worker = self._workers[name]
            if life == worker.life:
                events.extend(self._happen(when, worker, what, job_id))
        return tuple(events)

    def _happen(self, when: float, worker: _Worker, what: str, job_id: str) -> Iterable[PoolEvent]:
        match what:
            case "death":
                yield from self._die(worker, when)
            case "unit":
                worker.unit, worker.jobs = None, ()
                self._end_work(worker, when)
                yield self._answers.pop(worker.name)
            case "publish":
                worker.publishing.discard(job_id)
                self._end_work(worker, when)
                published = PublishOutcome(job_id=job_id, release=_release(job_id), seconds=0.5)
                yield PublishFinished(worker=worker.name, outcome=published)

    def _progress(self, worker: _Worker) -> Progress:
        share = min(1.0, (self._pinged_at - worker.started_at) / (worker.ends_at - worker.started_at))
        stage = "plan" if share < 0.05 else "merge" if share < 0.7 else "verify"
        assert worker.unit is not None
        return Progress(
            unit=worker.unit,
            stages=dict.fromkeys(worker.jobs, stage),
            bytes_done=int(share * 1e9),
            bytes_total=int(1e9),
        )

    def _die(self, worker: _Worker, when: float) -> Iterable[PoolEvent]:
        self.num_deaths += 1
        worker.life += 1
        worker.unit, worker.jobs = None, ()
        worker.publishing.clear()
        worker.residents.clear()
        self._end_work(worker, when)
        worker.up_at = when + self._costs.seconds_to_start
        self._plan_death(worker, worker.up_at)
        yield WorkerLost(worker=worker.name, reason="it died in the simulation")

    def _plan_death(self, worker: _Worker, now: float) -> None:
        if self._hours_between_deaths is not None:
            self._plan(now + self._rng.expovariate(1 / (3600 * self._hours_between_deaths)), worker, "death")

    def _plan(self, when: float, worker: _Worker, what: str, job_id: str = "") -> None:
        heapq.heappush(self._agenda, (when, next(self._numbers), worker.name, worker.life, what, job_id))

    def _begin_work(self, worker: _Worker) -> None:
        if worker.busy_since is None:
            worker.busy_since = self._clock()

    def _end_work(self, worker: _Worker, when: float) -> None:
        if worker.busy_since is not None and not worker.busy:
            self.busy_seconds += when - worker.busy_since
            worker.busy_since = None


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
