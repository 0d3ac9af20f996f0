"""A driver as a job of a Ray cluster that others started: submitted by the script for it, and asked to stop.

Ray is real: `ray start`, as the launcher and KubeRay run it, with its token, and `ray job submit`.
"""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import JobState
from tests.models import build_llama, make_adapter
from workers.releases.delivery import verify_release

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DEPLOY = Path(__file__).parents[2] / "cluster" / "deploy"
SUBMIT = DEPLOY / "submit-job.sh"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base that takes a worker a few seconds, and an adapter for it."""
    directory = tmp_path_factory.mktemp("models")
    base = build_llama(
        directory / "base", hidden_size=384, intermediate_size=1024, num_hidden_layers=8, max_shard_size="10MB"
    )
    make_adapter(base, directory / "adapter", seed=0)
    return directory


@pytest.fixture(scope="module")
def free_ports():
    """Bound together, so that all are different; free a moment later."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What every process of the cluster has: a token, the settings, and the command on its path."""
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    programs = home / "bin"
    programs.mkdir()
    command = programs / "mergefleet"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from cluster.cli import main; main()" "$@"\n')
    command.chmod(0o755)
    ray = programs / "ray"
    ray.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from ray.scripts.scripts import main; main()" "$@"\n')
    ray.chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MERGEFLEET_"))},
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only: see `cluster/ray_fleet/session.py`
        "MERGEFLEET_HOME": str(home / "fleet"),
        "MERGEFLEET_POLL_SECONDS": "0.2",
        "MERGEFLEET_WORKERS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def cluster(environment, free_ports):
    """The URL of the dashboard of a Ray that `ray start` began, and that process, which is above all of its own."""
    gcs_port, dashboard_port, metrics_port = free_ports
    url = f"http://127.0.0.1:{dashboard_port}"
    with tempfile.TemporaryDirectory(prefix="mf-", ignore_cleanup_errors=True) as short:
        command = [
            *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"),
            *(f"--port={gcs_port}", f"--dashboard-port={dashboard_port}", f"--metrics-export-port={metrics_port}"),
            *("--dashboard-host=127.0.0.1", "--num-cpus=2", "--num-gpus=0", "--object-store-memory=104857600"),
            f"--temp-dir={short}",
        ]
        log = Path(environment["HOME"]) / "ray.log"
        with log.open("w") as out:
            ray = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            end = time.monotonic() + 90
            while not _takes_jobs(url, environment):
                assert ray.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(0.5)
            yield url, psutil.Process(ray.pid)
        finally:
            ray.send_signal(signal.SIGTERM)
            ray.wait(60)


def _takes_jobs(url, environment):
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    asked = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(asked, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture
def ray_job(cluster, environment):
    """Runs a program as a person does who knows the URL of the dashboard."""

    def run(*command):
        return subprocess.run(
            [str(word) for word in command],
            env=environment | {"RAY_API_SERVER_ADDRESS": cluster[0]},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def store(environment):
    with contextlib.closing(JobStore(f"sqlite:///{environment['MERGEFLEET_HOME']}/mergefleet.db")) as opened:
        yield opened


def submit_requests(store, models, name, num_jobs):
    store.submit(
        [
            MergeRequest(
                id=f"{name}-{number}",
                base=str(models / "base"),
                adapter=str(models / "adapter"),
                destination=str(models / "releases" / f"{name}-{number}"),
                base_quantization="none",
                parity={"level": "arithmetic"},
            )
            for number in range(num_jobs)
        ]
    )


def test_a_job_joins_its_own_cluster_and_drains_the_queue(ray_job, store, models):
    submit_requests(store, models, "drained", 2)
    result = ray_job(SUBMIT, "--drain", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Job 'mergefleet' succeeded" in result.stdout + result.stderr
    records = store.jobs(ids=["drained-0", "drained-1"])
    assert Counter(record.state for record in records) == {JobState.PUBLISHED: 2}
    for record in records:
        verify_release(record.release.location, models / "scratch")


def workers_that_a_pod_waits_for(cluster):
    """The processes of the cluster that the hook of its worker pods finds."""
    documents = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "raycluster.yaml").read_text())}
    (container,) = documents["RayCluster"]["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    pattern = re.search(r"pgrep -f '(.+)'", hook)[1]
    assert not re.search(pattern, hook), "the hook would wait for itself"
    found = []
    for process in cluster[1].children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += re.findall(pattern, " ".join(process.cmdline()))
    return found


def test_a_job_that_is_stopped_gives_everything_back(ray_job, cluster, store, models):
    """One SIGTERM, however often it is asked for, and the time to heed it; no second driver is let in meanwhile."""
    submit_requests(store, models, "stopped", 24)
    with followed_driver(ray_job) as told:
        end = time.monotonic() + 120
        while not any(record.stage == "merge" for record in store.jobs(states=[JobState.MERGING])):
            assert time.monotonic() < end, told()
            time.sleep(0.05)
        second = ray_job(SUBMIT, "--drain")
        assert second.returncode != 0
        assert len(workers_that_a_pod_waits_for(cluster)) == 1
        ray_job("ray", "job", "stop", "--no-wait", "mergefleet")
        stopped = ray_job("ray", "job", "stop", "mergefleet")
        assert "was stopped" in stopped.stdout + stopped.stderr
    assert not workers_that_a_pod_waits_for(cluster)
    states = Counter(record.state for record in store.jobs() if record.id.startswith("stopped"))
    assert states[JobState.QUEUED] > 0
    assert states.keys() <= {JobState.QUEUED, JobState.PUBLISHED}
    assert {record.attempts for record in store.jobs(states=[JobState.QUEUED])} == {0}
    log = ray_job("ray", "job", "logs", "mergefleet")
    assert '"event": "summary"' in log.stdout + log.stderr, "it was killed before it had ended in order"
    assert ray_job(SUBMIT, "--drain").returncode == 0
    assert not [record for record in store.jobs() if record.state is not JobState.PUBLISHED]


@contextlib.contextmanager
def followed_driver(ray_job):
    """A driver that stays until it is stopped, followed by the script; yields a function that waits for its end."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(ray_job, SUBMIT, "--json")
        yield lambda: future.result(10)
        future.result(60)


def test_a_driver_that_would_pass_its_cluster_by_is_refused(ray_job):
    """Inside a job RAY_ADDRESS is set: without a word a Ray inside of Ray would be started."""
    result = ray_job("ray", "job", "submit", "--", "mergefleet", "run", "--drain")
    assert result.returncode != 0
    assert "say --address auto to join that cluster" in result.stdout + result.stderr
