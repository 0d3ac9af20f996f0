"""Workers as Ray actors: calls, progress beside work, deaths and replacements.

The worker here is a plain class with the methods of `MergeWorker` that sleeps instead of merging, so that a test can
say when it dies. Ray is real: a local one, as `mergefleet run` starts it.
"""

import dataclasses
import os
import re
import signal
import socket
import stat
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster.driving.replies import (
    CallFailed,
    PassBegun,
    ProgressSeen,
    PublishFinished,
    ShardsMerged,
    TurnedDown,
    UnitFinished,
    WorkerLost,
    WorkerUnfit,
)
from cluster.ray_fleet.crews import Crew
from cluster.ray_fleet.metrics import FleetMetrics
from cluster.ray_fleet.pool import WorkerPool
from cluster.ray_fleet.session import close_session, open_session
from cluster.settings import Settings
from jobs.errors import FailureClass, WorkerLostError
from jobs.request import MergeRequest
from jobs.states import JobState
from workers.merging.outcomes import (
    Failure,
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
    Unreachable,
    Usage,
)
from workers.releases.sinks import Ticket

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("session")]

CREW = Crew(num_workers=2, device="cpu", num_threads=3)


class SleepingWorker:
    """Takes as long as it is told; says its pid in its progress."""

    def __init__(self, directory):
        self.directory = directory
        self.cancelled = frozenset()
        self.unit = ""

    def ready(self):
        return Readiness(host="here")

    def run_unit(self, name, requests):
        self.unit = name
        self.cancelled = frozenset()
        for request in requests:
            if request.labels.get("raise"):
                raise ValueError(request.labels["raise"])
        seconds = float(requests[0].labels.get("seconds", "0"))
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.cancelled:
            time.sleep(0.02)
        return UnitOutcome(
            jobs=tuple(self._outcome(request) for request in requests),
            usage=Usage(bytes_read=100, bytes_written=200, seconds={"merge": seconds + 0.5}),
            residents=(requests[0].pass_key(),),
        )

    def _outcome(self, request):
        if request.id in self.cancelled:
            failure = Failure(failure_class=FailureClass.CANCELLED, message="cancelled")
            return JobOutcome(job_id=request.id, failure=failure)
        return JobOutcome(job_id=request.id, merge_key="a" * 64)

    def open_pass(self, pass_id, name, requests):
        self.unit = name
        tickets = {each.id: Ticket(directory=Path("/s"), attempt=pass_id, merge_key="a" * 64) for each in requests}
        piece = Piece(shards=("model.safetensors",), num_bytes=1)
        return PassOpened(ended=(), tickets=tickets, pieces=(piece,), bytes_total=2, usage=Usage())

    def merge_shards(self, work, shards):
        if work.requests[0].labels.get("elsewhere"):
            return Unreachable(reason="not to be seen from here")
        checks = tuple(sorted(shards))
        merged = MergedShards(receipts=(), checks=checks, wrong=())
        merged = dict.fromkeys(work.tickets, merged)
        return ShardsOutcome(merged=merged, ended=(), usage=Usage(), residents=("held",))

    def finish_pass(self, work, merged):
        assert merged.keys() == work.tickets.keys()
        return UnitOutcome(jobs=(JobOutcome(job_id="one", merge_key="a" * 64),), usage=Usage(), residents=())

    def publish(self, job_id):
        return PublishOutcome(job_id=job_id, seconds=0.1)

    def discard(self, job_id):
        pass

    def progress(self):
        stages = {"pid": str(os.getpid()), "threads": os.environ["OMP_NUM_THREADS"]}
        return Progress(unit=self.unit, stages=stages, bytes_done=1, bytes_total=2)

    def cancel(self, job_ids):
        self.cancelled |= job_ids

    def residents(self):
        return ()

    def close(self):
        Path(self.directory, f"closed-{os.getpid()}").touch()


class BrokenWorker(SleepingWorker):
    """Never starts."""

    def __init__(self, _directory):
        raise OSError("no space left on device")


def request(name="one", **labels):
    return MergeRequest(id=name, base="/b", adapter=f"/a/{name}", destination=f"/r/{name}", labels=labels)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        patch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="mf-", ignore_cleanup_errors=True) as short:
        settings = Settings(home=home, ray_directory=short)
        yield open_session(settings, namespace="test", address=None, log_format="json")
        close_session()
    patch.undo()


@pytest.mark.usefixtures("session")
def test_nobody_else_can_enter_the_directory_of_a_local_ray():
    import ray

    directory = Path(ray._private.worker._global_node.get_session_dir_path())
    closed = directory.parent.parent
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert closed.name == "own"


@pytest.fixture
def make_pool(tmp_path):
    pools = []

    def make(worker_class=SleepingWorker, crews=(CREW,), **options):
        pools.append(WorkerPool(worker_class, arguments, crews, **{"ping_seconds": 0.1, **options}))
        return pools[-1]

    def arguments(_crew):
        return (str(tmp_path),)

    yield make
    for pool in pools:
        pool.close()


def until(pool, kind, *, seconds=30.0, num=1):
    """Poll until `num` events of a kind have come; return all events on the way."""
    events = []
    end = time.monotonic() + seconds
    while sum(isinstance(event, kind) for event in events) < num:
        assert time.monotonic() < end, events
        events += pool.poll(0.2)
    return events


def ready(pool, num=2):
    end = time.monotonic() + 60
    while sum(view.idle for view in pool.views()) < num:
        assert time.monotonic() < end, pool.views()
        pool.poll(0.2)


def last(events, kind):
    return [event for event in events if isinstance(event, kind)][-1]


def test_a_unit_runs_and_is_published(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-1", "merge:b:1 adapter", (request(),))
    assert [view.idle for view in pool.views()] == [True, False]
    outcome = last(until(pool, UnitFinished), UnitFinished).outcome
    assert outcome.jobs[0].job_id == "one"
    assert pool.views()[1].residents == {request().pass_key()}
    pool.publish("merge-worker-1", "one")
    pool.discard("merge-worker-1", "one")
    assert last(until(pool, PublishFinished), PublishFinished).outcome.job_id == "one"


def test_a_pass_goes_through_several_workers(make_pool):
    pool = make_pool()
    ready(pool)
    pool.open_pass("merge-worker-0", "p", "plan:b:1 adapter", (request(),))
    assert [view.idle for view in pool.views()] == [False, True]
    begun = last(until(pool, PassBegun), PassBegun)
    assert (begun.worker, begun.pass_id) == ("merge-worker-0", "p")
    work = PassWork(pass_id="p", name="merge:b", requests=(request(),), tickets=begun.outcome.tickets)
    pool.merge_shards("merge-worker-1", work, frozenset(begun.outcome.pieces[0].shards))
    merged = last(until(pool, ShardsMerged), ShardsMerged)
    assert (merged.worker, merged.pass_id) == ("merge-worker-1", "p")
    assert merged.outcome.merged["one"].checks == ("model.safetensors",)
    assert pool.views()[1].residents == {"held"}
    pool.finish_pass("merge-worker-0", work, {"one": (merged.outcome.merged["one"],)})
    assert last(until(pool, UnitFinished), UnitFinished).outcome.jobs[0].job_id == "one"
    pool.merge_shards("merge-worker-1", dataclasses.replace(work, requests=(request(elsewhere="1"),)), frozenset())
    refused = last(until(pool, TurnedDown), TurnedDown)
    assert (refused.worker, refused.pass_id, refused.reason) == ("merge-worker-1", "p", "not to be seen from here")


def test_progress_and_cancellation_reach_a_worker_at_work(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "merge:b:1 adapter", (request(seconds="60"),))
    while (progress := last(until(pool, ProgressSeen), ProgressSeen).progress).unit == "":
        pass  # asked before the unit had begun
    assert progress.unit == "merge:b:1 adapter"
    assert progress.stages["threads"] == str(CREW.num_threads)
    pool.cancel("merge-worker-0", ["one"])
    outcome = last(until(pool, UnitFinished), UnitFinished).outcome
    assert outcome.jobs[0].failure.failure_class is FailureClass.CANCELLED


def test_a_worker_that_is_killed_is_told_and_replaced_under_its_name(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "merge:b:1 adapter", (request(seconds="60"),))
    pid = int(last(until(pool, ProgressSeen), ProgressSeen).progress.stages["pid"])
    os.kill(pid, signal.SIGKILL)
    lost = last(until(pool, WorkerLost, seconds=5), WorkerLost)
    assert lost.worker == "merge-worker-0"
    assert "died" in lost.reason
    ready(pool)
    pool.run_unit("merge-worker-0", "merge:b:1 adapter", (request("two"),))
    assert last(until(pool, UnitFinished), UnitFinished).worker == "merge-worker-0"


def test_a_worker_that_dies_idle_is_replaced(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "u", (request(seconds="0.5"),))
    pid = int(last(until(pool, ProgressSeen), ProgressSeen).progress.stages["pid"])
    until(pool, UnitFinished)
    os.kill(pid, signal.SIGKILL)
    until(pool, WorkerLost, seconds=5)
    ready(pool)


def test_a_worker_that_stops_answering_is_killed_and_replaced(make_pool):
    pool = make_pool(unresponsive_seconds=1.0)
    ready(pool)
    pool.run_unit("merge-worker-0", "u", (request(seconds="60"),))
    pid = int(last(until(pool, ProgressSeen), ProgressSeen).progress.stages["pid"])
    os.kill(pid, signal.SIGSTOP)
    lost = last(until(pool, WorkerLost, seconds=10), WorkerLost)
    assert (lost.worker, lost.reason) == ("merge-worker-0", "no answer for 1 s")
    ready(pool)


def test_an_exception_out_of_a_worker_is_an_event(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "u", (request(**{"raise": "what now"}),))
    failed = last(until(pool, CallFailed), CallFailed)
    assert (failed.call, failed.job_id, failed.message) == ("run_unit", None, "what now")
    assert all(view.idle for view in pool.views())


def test_workers_that_never_start_end_the_driver_with_the_reason(make_pool):
    pool = make_pool(BrokenWorker)
    with pytest.raises(WorkerLostError, match="no space left on device"):
        ready(pool)


class HalfBlindWorker(SleepingWorker):
    """Says that its GPU is of no use, unless a file is there."""

    def ready(self):
        usable = Path(self.directory, "mended").exists() or "merge-worker-1" in name_of_this_actor()
        return Readiness(host="gpu-7", fault=None if usable else "device 'cuda' cannot be used: ECC error")

    def run_unit(self, name, requests):
        outcome = super().run_unit(name, requests)
        if not requests[0].labels.get("breaks"):
            return outcome
        failure = Failure(failure_class=FailureClass.WORKER_LOST, message="the GPU failed at work")
        return dataclasses.replace(outcome, jobs=(JobOutcome(job_id=requests[0].id, failure=failure),))


def name_of_this_actor():
    import ray

    return ray.get_runtime_context().get_actor_name()


def test_a_worker_that_cannot_use_its_gpu_gets_no_work_is_told_once_and_tried_again(make_pool, tmp_path):
    pool = make_pool(HalfBlindWorker)
    unfit = last(until(pool, WorkerUnfit), WorkerUnfit)
    assert (unfit.worker, unfit.reason) == ("merge-worker-0", "gpu-7: device 'cuda' cannot be used: ECC error")
    ready(pool, num=1)
    end = time.monotonic() + 6
    while time.monotonic() < end:  # longer than it takes to fail again, with pauses of 1 s and 2 s
        assert not [event for event in pool.poll(0.2) if isinstance(event, WorkerUnfit | WorkerLost)]
    assert [(view.idle, view.up) for view in pool.views()] == [(False, False), (True, True)]
    (tmp_path / "mended").touch()
    ready(pool)
    # One whose GPU fails at work is lost with what it did, and its place rests before it is filled again.
    pool.run_unit("merge-worker-0", "u", (request(breaks="1"),))
    lost = last(until(pool, WorkerLost), WorkerLost)
    assert (lost.worker, lost.reason) == ("merge-worker-0", "the GPU failed at work")
    ready(pool)


def test_closing_lets_idle_workers_sweep(make_pool, tmp_path):
    pool = make_pool()
    ready(pool)
    pool.close()
    assert len(list(tmp_path.glob("closed-*"))) == CREW.num_workers


def test_every_metric_is_on_the_prometheus_endpoint(session):
    metrics = FleetMetrics()
    metrics.observe(jobs={JobState.QUEUED: 3}, num_waiting=2, num_in_flight=1, residents={"merge-worker-0": 1})
    passed = JobOutcome(job_id="one", merge_key="a" * 64)
    failed = JobOutcome(
        job_id="two",
        failure=Failure(failure_class=FailureClass.PARITY_FAILED, message="no"),
    )
    usage = Usage(bytes_read=100, bytes_written=200, bytes_uploaded=50, seconds={"merge": 1.5})
    metrics.unit_finished(UnitOutcome(jobs=(passed, failed), usage=usage, residents=()))
    metrics.used(usage)
    metrics.publish_finished(PublishOutcome(job_id="one", seconds=0.25))
    metrics.settled("published")
    metrics.worker_lost()
    metrics.worker_benched()
    expected = {
        ("ray_mergefleet_jobs", "QUEUED"): 3,
        ("ray_mergefleet_jobs", "FAILED"): 0,
        ("ray_mergefleet_queue_depth", ""): 2,
        ("ray_mergefleet_units_in_flight", ""): 1,
        ("ray_mergefleet_workers", ""): 1,
        ("ray_mergefleet_resident_bases", "merge-worker-0"): 1,
        ("ray_mergefleet_bytes_total", "read"): 100,
        ("ray_mergefleet_bytes_total", "written"): 200,
        ("ray_mergefleet_bytes_total", "uploaded"): 50,
        ("ray_mergefleet_stage_seconds_total", "merge"): 1.5,
        ("ray_mergefleet_stage_seconds_total", "publish"): 0.25,
        ("ray_mergefleet_units_total", ""): 1,
        ("ray_mergefleet_parity_total", "passed"): 1,
        ("ray_mergefleet_parity_total", "failed"): 1,
        ("ray_mergefleet_settled_total", "published"): 1,
        ("ray_mergefleet_worker_deaths_total", ""): 1,
        ("ray_mergefleet_workers_benched_total", ""): 1,
    }
    end = time.monotonic() + 60
    while (found := scrape(session.metrics_urls[0])).keys() < expected.keys() or any(
        found[key] != value for key, value in expected.items()
    ):
        assert time.monotonic() < end, {key: found.get(key) for key in expected}
        time.sleep(1)


def scrape(url):
    """Return what the endpoint says of our metrics: (name, value of our one label) to figure."""
    with urllib.request.urlopen(url, timeout=5) as response:
        text = response.read().decode()
    found = {}
    for line in text.splitlines():
        match = re.match(r"(ray_mergefleet_\w+)\{(.*)\} (\S+)$", line)
        if match:
            label = re.search(r'(?:state|worker|direction|stage|result|outcome)="([^"]*)"', match[2])
            found[match[1], label[1] if label else ""] = float(match[3])
    return found


def test_a_local_ray_listens_on_this_machine_only_and_asks_for_its_token(session):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{session.dashboard_url}/api/version", timeout=5)
    caught.value.close()
    assert caught.value.code == 401
    assert session.token_path.stat().st_mode & 0o777 == 0o600
    token = session.token_path.read_text()
    asked = urllib.request.Request(f"{session.dashboard_url}/api/version", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=5) as response:
        assert response.status == 200
    me = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.type == socket.SOCK_STREAM
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_the_dashboard_names_workers_and_units(make_pool, session):
    from ray.util.state import list_actors, list_tasks

    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "merge:llama-3-8b:3 adapters", (request(),))
    until(pool, UnitFinished)
    alive = {actor.name for actor in list_actors(address=session.dashboard_url) if actor.state == "ALIVE"}
    assert alive >= {"merge-worker-0", "merge-worker-1"}
    end = time.monotonic() + 30
    while "merge:llama-3-8b:3 adapters" not in {
        task.name for task in list_tasks(address=session.dashboard_url, limit=1000)
    }:
        assert time.monotonic() < end
        time.sleep(0.5)
