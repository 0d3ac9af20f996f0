"""A driver on a real store and a real pool, in memory, of workers that answer what the test says."""

import random
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

from cluster.driving.driver import Driver
from cluster.fleet.actors import ActorGoneError
from cluster.fleet.crews import Crew
from cluster.fleet.in_memory import InMemoryActors
from cluster.fleet.pool import WorkerPool
from cluster.settings import Settings
from jobs.errors import FailureClass
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.locations import parse_location
from jobs.parity_report import ParitySummary
from jobs.release import Artifact, Manifest, Release
from jobs.request import MergeRequest
from workers.merging.outcomes import (
    Failure,
    JobOutcome,
    MergedShards,
    PassOpened,
    Piece,
    Progress,
    PublishOutcome,
    Readiness,
    ShardsOutcome,
    UnitOutcome,
    Unreachable,
    Usage,
)
from workers.releases.sinks import Ticket

PENDING = object()
NOTHING_USED = Usage(bytes_read=0, bytes_written=0, bytes_uploaded=0, seconds={})


def request(name, base="/bases/a", **fields):
    return MergeRequest(id=name, base=base, adapter=f"/adapters/{name}", destination=f"/releases/{name}", **fields)


def release(name, *, created=True):
    manifest = Manifest(
        merge_key="a" * 64,
        request_id=name,
        base=parse_location("/bases/a"),
        base_digest="b" * 64,
        adapter=parse_location(f"/adapters/{name}"),
        adapter_digest="c" * 64,
        base_quantization="none",
        quantization_options=None,
        dtype=None,
        parity=ParitySummary(
            level="arithmetic",
            num_tensors=1,
            num_changed_tensors=1,
            rounding_excess=0.5,
            min_survival=1.0,
            mean_kl=None,
            top1_agreement=None,
        ),
        files=(Artifact(path="model.safetensors", num_bytes=1, sha256="d" * 64),),
        versions={},
    )
    return Release(location=f"/releases/{name}", manifest=manifest, manifest_sha256="e" * 64, created=created)


class ScriptedWorkers:
    """The workers of a pool: they keep what they are told, and answer when and what the test says.

    What they are asked at the side (whether they are ready, which bases they hold, to discard, to cancel) they answer
    at once.
    """

    def __init__(self):
        self.actors = {}  # worker -> the actor in its place
        self.units = []
        self.opened = []
        self.given = []
        self.finishing = []
        self.published = []
        self.discarded = []
        self.left = []
        self.approved = {}
        self.cancelled = []
        self.on_poll = lambda: None
        self.down = set()  # those that never come up
        self.hosts = {}  # worker -> its machine; "here" for those that are not named
        self.unfit = {}  # worker -> what is wrong with its GPU
        self.progress = {}  # worker -> what it tells

    def start(self, name, _crew):
        self.actors[name] = ScriptedActor(name, self)
        return self.actors[name]

    def wait(self, _futures, _timeout_seconds, *, for_all):
        assert not for_all
        self.on_poll()

    @property
    def busy(self):
        """Worker to the ids of the jobs of the unit it is at."""
        return {name: actor.jobs for name, actor in self.actors.items() if actor.unit is not None}

    def _answer(self, worker, value):
        self.actors[worker].end_unit().set_result(value)

    def fail(self, worker, error):
        """Have what it is at raise."""
        self.actors[worker].end_unit().set_exception(error)

    def finish(self, worker, *outcomes, usage=NOTHING_USED):
        self._answer(worker, UnitOutcome(jobs=tuple(outcomes), usage=usage, residents=()))

    def begin(self, worker, *names, num_pieces=4, ended=(), usage=NOTHING_USED):
        """Answer `open_pass`: so many pieces of one shard."""
        pieces = tuple(Piece(shards=(f"shard-{n}",), num_bytes=100) for n in range(num_pieces))
        ticket = Ticket(directory=Path("/staging"), attempt="x", merge_key="a" * 64)
        tickets = dict.fromkeys(names, ticket)
        self._answer(worker, PassOpened(ended=ended, tickets=tickets, pieces=pieces, bytes_total=800, usage=usage))

    def merge(self, worker, *names, ended=(), usage=NOTHING_USED):
        """Answer `merge_shards`: what was given last to this worker; its checks stand for the shards."""
        shards = [shards for each, shards in self.given if each == worker][-1]
        merged = dict.fromkeys(names, MergedShards(receipts=(), checks=shards, wrong=()))
        self._answer(worker, ShardsOutcome(merged=merged, ended=ended, usage=usage, residents=()))

    def refuse(self, worker):
        self._answer(worker, Unreachable(reason="it sees no such directory"))

    def finish_publish(self, worker, name, failure=None):
        outcome = PublishOutcome(
            job_id=name,
            failure=failure,
            release=None if failure else release(name),
            seconds=0.0,
        )
        self.actors[worker].publishing.pop(name).set_result(outcome)

    def lose(self, worker, *, out_of_memory=False):
        self.actors[worker].die("killed by signal 9", out_of_memory)

    def lose_gpu(self, worker):
        """Have the GPU of a worker fail under its unit."""
        self.finish(worker, *(failed(job, FailureClass.WORKER_LOST) for job in self.busy[worker]))


class ScriptedActor:
    node = None

    def __init__(self, name, script):
        self.name = name
        self.script = script
        self.unit = None
        self.jobs = ()
        self.publishing = {}
        self.gone = None

    def call(self, method, *arguments, task_name):
        future = Future()
        if self.gone is not None:
            future.set_exception(self.gone)
        elif (answer := getattr(self, method)(future, task_name, *arguments)) is not PENDING:
            future.set_result(answer)
        return future

    def kill(self):
        self.unit = None

    def die(self, reason, out_of_memory=False):
        self.gone = ActorGoneError(reason, out_of_memory)
        pending = [*self.publishing.values(), *([self.end_unit()] if self.unit else ())]
        for future in pending:
            future.set_exception(self.gone)

    def end_unit(self):
        future, self.unit = self.unit, None
        return future

    def _begin(self, future, requests):
        assert self.unit is None
        self.unit = future
        self.jobs = tuple(each.id for each in requests)
        return PENDING

    def ready(self, *_):
        if self.name in self.script.down:
            return PENDING
        host = self.script.hosts.get(self.name, "here")
        return Readiness(host=host, fault=self.script.unfit.get(self.name), log=f"{self.name}@{host}.jsonl")

    def run_unit(self, future, task_name, name, requests):
        assert task_name == name
        self.script.units.append((self.name, name, tuple(each.id for each in requests)))
        return self._begin(future, requests)

    def open_pass(self, future, _, pass_id, _name, requests):
        self.script.opened.append((self.name, pass_id, tuple(each.id for each in requests)))
        return self._begin(future, requests)

    def merge_shards(self, future, _, work, shards):
        assert work.tickets.keys() == {each.id for each in work.requests}
        self.script.given.append((self.name, tuple(sorted(shards))))
        return self._begin(future, work.requests)

    def finish_pass(self, future, _, work, merged):
        checks = {job: [each.checks for each in parts] for job, parts in merged.items()}
        self.script.finishing.append((self.name, checks))
        return self._begin(future, work.requests)

    def publish(self, future, _, job_id, approved_by):
        self.script.published.append((self.name, job_id))
        self.script.approved[job_id] = approved_by
        self.publishing[job_id] = future
        return PENDING

    def leave(self, _future, _, job_id):
        self.script.left.append((self.name, job_id))

    def discard(self, _future, _, job_id):
        self.script.discarded.append((self.name, job_id))

    def cancel(self, _future, _, job_ids):
        self.script.cancelled.append((self.name, tuple(sorted(job_ids))))

    def progress(self, *_):
        return self.script.progress.pop(self.name, Progress(unit="", stages={}, bytes_done=0, bytes_total=0))

    def residents(self, *_):
        return ()


def staged(name):
    return JobOutcome(job_id=name, merge_key="a" * 64, failure=None, release=None, parity=None, report_path=None)


def failed(name, failure_class, **fields):
    failure = Failure(failure_class=failure_class, message=f"{failure_class} it is", **fields)
    return JobOutcome(job_id=name, merge_key=None, failure=failure, release=None, parity=None, report_path=None)


class CountedMetrics:
    """Counts what a driver tells; the real ones need a Ray session and are scraped in the integration tests."""

    def __init__(self):
        self.settlements = Counter()
        self.counts = Counter()
        self.gauges = {}

    def observe(self, *, jobs, num_waiting, num_in_flight, residents):
        self.gauges = {"jobs": jobs, "waiting": num_waiting, "in flight": num_in_flight, "residents": residents}

    def unit_finished(self, _outcome):
        self.counts["units"] += 1

    def used(self, _usage):
        self.counts["calls with usage"] += 1

    def publish_finished(self, _outcome):
        self.counts["publications"] += 1

    def settled(self, outcome):
        self.settlements[outcome] += 1

    def worker_lost(self):
        self.counts["deaths"] += 1

    def paused(self, places):
        self.places = set(places)

    def excused(self, failure):
        self.counts[f"excused {failure}"] += 1

    def worker_benched(self):
        self.counts["benched"] += 1


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Fleet:
    """One driver, its store, its workers, and time."""

    def __init__(self, path, num_workers=1, num_gpus=0, hosts=None, **settings):
        self.ledger_time = 1e9
        self.store = JobStore(f"sqlite:///{path}/jobs.db", clock=lambda: self.ledger_time)
        self.workers = ScriptedWorkers()
        self.workers.hosts = hosts or {}
        self.events = []
        self.clock = Clock()
        crews = [Crew(num_workers=num_workers - num_gpus, device="cpu", num_threads=1)]
        if num_gpus:
            crews.insert(0, Crew(num_workers=num_gpus, device="cuda", num_threads=1))
        actors = InMemoryActors(self.workers.start, self.workers.wait)
        self.pool = WorkerPool(actors, crews, ping_seconds=0.0, clock=self.clock)
        self.pool.poll(0.0)  # they come up
        self.sleeps = []
        self.metrics = CountedMetrics()
        self.driver = Driver(
            self.store,
            self.pool,
            Settings(**{"poll_seconds": 0.01, "retry_delay_seconds": 0.0} | settings),
            self.metrics,
            owner="driver-a",
            listener=self.events.append,
            clock=self.clock,
            sleep=self.sleeps.append,
            rng=random.Random(0),
        )

    def submit(self, *requests):
        self.store.submit(requests)

    def job(self, name):
        return self.store.jobs(Selection(ids=[name]))[0]

    def states(self):
        return {record.id: record.state for record in self.store.jobs()}

    def history(self, name):
        return [event.state for event in self.store.events(name)]

    def wait(self, seconds):
        """Let time go by; the next round sees it."""
        self.clock.now += seconds
        self.ledger_time += seconds

    def step(self, times=1):
        for _ in range(times):
            self.clock.now += 0.02  # longer than one round may wait
            self.ledger_time += 0.02
            self.driver.step()
