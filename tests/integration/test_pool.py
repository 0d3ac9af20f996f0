"""Workers as Ray actors: what only processes and Ray can do. What every pool does is in tests/contract/test_pools.py.

Ray is real: a local one, as `mergefleet run` starts it.
"""

import os
import re
import signal
import socket
import stat
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster.driving.replies import ProgressSeen, UnitFinished, WorkerLost
from cluster.fleet.pool import WorkerPool
from cluster.ray_fleet.actors import RayActors
from cluster.ray_fleet.metrics import FleetMetrics
from jobs.errors import FailureClass
from jobs.states import JobState
from tests.sleeping import CREW, SleepingWorker, last, ready, request, until
from workers.merging.outcomes import Failure, JobOutcome, PublishOutcome, UnitOutcome, Usage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def test_nobody_else_can_enter_the_directory_of_a_local_ray():
    import ray

    directory = Path(ray._private.worker._global_node.get_session_dir_path())
    closed = directory.parent.parent
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert closed.name == "own"


@pytest.fixture
def make_pool(tmp_path):
    pools = []

    def make(**options):
        pools.append(WorkerPool(RayActors(SleepingWorker, arguments), (CREW,), ping_seconds=0.1, **options))
        return pools[-1]

    def arguments(_crew):
        return (str(tmp_path),)

    yield make
    for pool in pools:
        pool.close()


def test_a_worker_that_is_killed_is_told_and_replaced_under_its_name(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "merge:b:1 adapter", (request(seconds="60"),))
    stages = last(until(pool, ProgressSeen), ProgressSeen).progress.stages
    assert stages["threads"] == str(CREW.num_threads)
    os.kill(int(stages["pid"]), signal.SIGKILL)
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


def test_every_metric_is_on_the_prometheus_endpoint(ray_session):
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
    while (found := scrape(ray_session.metrics_urls[0])).keys() < expected.keys() or any(
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


def test_a_local_ray_listens_on_this_machine_only_and_asks_for_its_token(ray_session):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{ray_session.dashboard_url}/api/version", timeout=5)
    caught.value.close()
    assert caught.value.code == 401
    assert ray_session.token_path.stat().st_mode & 0o777 == 0o600
    token = ray_session.token_path.read_text()
    asked = urllib.request.Request(
        f"{ray_session.dashboard_url}/api/version", headers={"Authorization": f"Bearer {token}"}
    )
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


def test_the_dashboard_names_workers_and_units(make_pool, ray_session):
    from ray.util.state import list_actors, list_tasks

    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "merge:llama-3-8b:3 adapters", (request(),))
    until(pool, UnitFinished)
    alive = {actor.name for actor in list_actors(address=ray_session.dashboard_url) if actor.state == "ALIVE"}
    assert alive >= {"merge-worker-0", "merge-worker-1"}
    end = time.monotonic() + 30
    while "merge:llama-3-8b:3 adapters" not in {
        task.name for task in list_tasks(address=ray_session.dashboard_url, limit=1000)
    }:
        assert time.monotonic() < end
        time.sleep(0.5)
