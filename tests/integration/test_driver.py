"""`mergefleet run` as an operator starts it: real Ray, real workers, real merges; parts of it die on the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
import pytest

from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import JobState
from tests.models import build_llama, make_adapter
from tests.releases import left_in
from workers.releases.delivery import verify_release

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MERGEFLEET = [sys.executable, "-c", "from cluster.cli import main; main()"]
NUM_ADAPTERS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base that takes a worker a few seconds, and adapters for it."""
    directory = tmp_path_factory.mktemp("models")
    base = build_llama(
        directory / "base", hidden_size=384, intermediate_size=1024, num_hidden_layers=8, max_shard_size="10MB"
    )
    for number in range(NUM_ADAPTERS):
        make_adapter(base, directory / f"adapter-{number}", seed=number)
    return directory


class Fleet:
    """A home of its own, and the command line run in it."""

    def __init__(self, home):
        self.home = home
        self.ray_directory = tempfile.TemporaryDirectory(prefix="mf-", ignore_cleanup_errors=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MERGEFLEET_"))},
            "HOME": str(home),
            "RAY_AUTH_MODE": "token",
            "MERGEFLEET_HOME": str(home / "fleet"),
            "MERGEFLEET_RAY_DIRECTORY": self.ray_directory.name,
            "MERGEFLEET_LEASE_SECONDS": "3",
            "MERGEFLEET_POLL_SECONDS": "0.2",
            "MERGEFLEET_RETRY_DELAY_SECONDS": "0.1",
            "OMP_NUM_THREADS": "1",
        }
        self.store = JobStore(f"sqlite:///{home}/fleet/mergefleet.db")
        self.processes = []

    def submit(self, models, num_jobs, **fields):
        """Submit so many jobs: half into the 16-bit base, half into the 4-bit one."""
        self.store.submit(
            [
                MergeRequest(
                    id=f"job-{number}",
                    base=str(models / "base"),
                    adapter=str(models / f"adapter-{number % NUM_ADAPTERS}"),
                    destination=str(self.home / "releases" / f"job-{number}"),
                    base_quantization=("none", "nf4")[number % 2],
                    **{"parity": {"level": "arithmetic"}} | fields,
                )
                for number in range(num_jobs)
            ]
        )

    def start(self, *arguments):
        """Start `mergefleet run --json`; its events go to a file."""
        path = self.home / f"run-{len(self.processes)}.jsonl"
        with path.open("w") as out, path.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                [*MERGEFLEET, "run", "--json", *arguments], stdout=out, stderr=log, env=self.environment
            )
        process.events_path = path
        self.processes.append(process)
        return process

    def finish(self, process, seconds=300):
        """Wait for a run; return its exit code and events."""
        code = process.wait(seconds)
        return code, [json.loads(line) for line in process.events_path.read_text().splitlines()]

    def until(self, condition, what, seconds=240):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{what} did not come: {self.logs()}"
            time.sleep(0.05)
        return found

    def merging(self):
        """The jobs that a worker is merging just now."""
        return [record for record in self.store.jobs(Selection(states=[JobState.MERGING])) if record.stage == "merge"]

    def events(self, process, kind):
        """What a run has told so far, of one kind."""
        lines = process.events_path.read_text().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == kind]

    def pid_at(self, process, job_id):
        """The process of the worker that got the unit with this job."""
        units = [event for event in self.events(process, "unit_started") if job_id in event["job_ids"]]
        return self.pids(process)[units[-1]["worker"]]

    def pids(self, process):
        """The processes of the workers that are alive, by name, as Ray's dashboard has them."""
        (started,) = self.events(process, "started")
        token = Path(started["token_path"]).read_text()
        asked = urllib.request.Request(
            f"{started['dashboard_url']}/api/v0/actors", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(asked, timeout=10) as response:
            actors = json.load(response)["data"]["result"]["result"]
        return {each["name"]: each["pid"] for each in actors if each["state"] == "ALIVE"}

    def logs(self):
        return [path.read_text()[-2000:] for path in self.home.glob("run-*")]

    def stop(self):
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        self.store.close()
        self.ray_directory.cleanup()


@pytest.fixture
def fleet(tmp_path):
    it = Fleet(tmp_path)
    yield it
    it.stop()


def workers_of(process):
    """The worker processes below a driver, by the title Ray gives them."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::MergeWorker"):
                found.append(child)
    return found


def check_releases(fleet, num_jobs):
    """Every job published once, every release whole, nothing else left at the destinations or in the scratch."""
    records = fleet.store.jobs()
    assert Counter(record.state for record in records) == {JobState.PUBLISHED: num_jobs}
    for record in records:
        states = [event.state for event in fleet.store.events(record.id)]
        assert states.count(JobState.PUBLISHED) == 1
        verify_release(record.release.location, fleet.home / "verify")
    assert sorted(path.name for path in (fleet.home / "releases").iterdir()) == sorted(record.id for record in records)
    scratch = fleet.home / "fleet" / "scratch"
    assert left_in(scratch) == []


@pytest.mark.slow
def test_a_batch_survives_the_death_of_a_worker(fleet, models):
    fleet.submit(models, 6)
    run = fleet.start("--drain", "--workers", "2")
    job = fleet.until(fleet.merging, "a merge")[0]
    os.kill(fleet.pid_at(run, job.id), signal.SIGKILL)
    code, events = fleet.finish(run)
    assert code == 0
    [lost] = [event for event in events if event["event"] == "worker_replaced"]
    assert job.id in lost["job_ids"]
    assert events[0]["event"] == "started"
    assert events[-1]["published"] == 6
    check_releases(fleet, 6)
    charged = int(len(lost["job_ids"]) == 1)  # one of several may not have been at fault, and pays nothing
    told = {(record.attempts, record.worker_losses) for record in fleet.store.jobs(Selection(ids=lost["job_ids"]))}
    assert told == {(1 + charged, charged)}


@pytest.mark.slow
def test_one_merge_is_shared_by_two_workers_and_survives_the_death_of_one(fleet, models):
    run = fleet.start("--workers", "2")
    fleet.until(lambda: fleet.events(run, "started"), "the start")
    fleet.until(lambda: len(fleet.pids(run)) == 2, "workers")
    time.sleep(2)  # they have answered by now
    fleet.submit(models, 1)

    def helpers():
        leaders = {event["worker"] for event in fleet.events(run, "unit_started")}
        return {event["worker"] for event in fleet.events(run, "shards_started")} - leaders

    (helper,) = fleet.until(helpers, "help")
    os.kill(fleet.pids(run)[helper], signal.SIGKILL)
    fleet.until(lambda: fleet.store.jobs(Selection(states=[JobState.PUBLISHED])), "the release")
    given = [name for event in fleet.events(run, "shards_started") for name in event["shards"]]
    assert set(given) == {path.name for path in (models / "base").glob("*.safetensors")}
    assert len(fleet.events(run, "worker_replaced")) == 1
    run.terminate()
    assert fleet.finish(run)[0] == 0
    check_releases(fleet, 1)
    (record,) = fleet.store.jobs()
    assert (record.attempts, record.worker_losses) == (1, 0)


@pytest.mark.slow
def test_a_batch_survives_the_death_of_its_driver(fleet, models):
    fleet.submit(models, 6)
    run = fleet.start("--drain", "--workers", "2")
    fleet.until(fleet.merging, "a merge")
    workers = workers_of(run)
    assert workers
    run.send_signal(signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []
    code, _ = fleet.finish(fleet.start("--drain", "--workers", "2"))
    assert code == 0
    check_releases(fleet, 6)


@pytest.mark.slow
@pytest.mark.parametrize("service", ["gcs_server", "raylet"])
def test_a_batch_survives_the_death_of_a_service_of_ray(fleet, models, service):
    """Without a control service Ray ends the driver; without a raylet it does not, and no worker would ever start."""
    fleet.environment["MERGEFLEET_MAX_JOBS_PER_PASS"] = "1"
    fleet.submit(models, 10)  # workers do not end at once
    run = fleet.start("--drain", "--workers", "1")
    fleet.until(fleet.merging, "a merge")
    (process,) = [
        each for each in psutil.Process(run.pid).children(recursive=True) if Path(each.cmdline()[0]).name == service
    ]
    process.kill()
    code, events = fleet.finish(run, seconds=200)
    assert code == 0
    assert len([event for event in events if event["event"] == "started"]) == 2
    check_releases(fleet, 10)


def test_sigterm_gives_everything_back_and_counts_no_attempt(fleet, models):
    fleet.submit(models, 4)
    run = fleet.start("--workers", "1")
    fleet.until(fleet.merging, "a merge")
    run.terminate()
    code, events = fleet.finish(run, seconds=60)
    assert code == 4  # stopped with work left
    assert {event["state"] for event in events if event["event"] == "job_settled"} <= {"QUEUED", "PUBLISHED"}
    given_back = fleet.store.jobs(Selection(states=[JobState.QUEUED]))
    assert given_back
    assert {record.attempts for record in given_back} == {0}


def test_exit_codes_tell_parity_from_other_failures(fleet, models):
    fleet.submit(models, 2, parity={"level": "arithmetic", "thresholds": {"max_rounding_excess": 0}})
    code, events = fleet.finish(fleet.start("--drain", "--workers", "1"))
    assert code == 3
    assert events[-1]["failures"] == {"parity_failed": 2}
    assert not (fleet.home / "releases" / "job-0").exists()
    record = fleet.store.jobs(Selection(ids=["job-0"]))[0]
    assert (Path(record.report_path) / "parity.json").exists()


def test_one_bad_job_does_not_stop_the_others(fleet, models):
    fleet.submit(models, 2)
    fleet.store.submit(
        [
            MergeRequest(
                id="bad",
                base=str(models / "base"),
                adapter=str(models / "nothing-here"),
                destination=str(fleet.home / "releases" / "bad"),
                base_quantization="none",
            )
        ]
    )
    code, events = fleet.finish(fleet.start("--drain", "--workers", "1"))
    assert code == 1
    assert (events[-1]["published"], events[-1]["failures"]) == (2, {"not_found": 1})


def test_a_driver_joins_a_running_cluster(fleet, models):
    """The cluster here is the local Ray of another process, joined by its address and token."""
    fleet.submit(models, 2)
    code = (
        "import sys\n"
        "from cluster.ray_fleet.session import open_session\n"
        "from cluster.settings import load_settings\n"
        "session = open_session(load_settings(), namespace='host', address=None, log_format='text')\n"
        "print(session.address, session.token_path, flush=True)\n"
        "sys.stdin.read()\n"
    )
    host = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=fleet.environment,
    )
    try:
        address, token_path = host.stdout.readline().split()
        del fleet.environment["MERGEFLEET_RAY_DIRECTORY"]
        fleet.environment["RAY_AUTH_TOKEN_PATH"] = token_path
        code, events = fleet.finish(fleet.start("--drain", "--workers", "1", "--address", address))
    finally:
        host.communicate("", timeout=60)
    assert code == 0
    assert events[0]["address"] == address
    check_releases(fleet, 2)


def test_a_local_setting_that_a_joined_cluster_would_ignore_is_refused(fleet):
    code, events = fleet.finish(fleet.start("--drain", "--address", "127.0.0.1:1"))
    assert code == 2
    assert "ray_directory" in events[-1]["error"]["message"]


def test_an_address_where_nobody_listens_is_told_at_once(fleet):
    del fleet.environment["MERGEFLEET_RAY_DIRECTORY"]
    code, events = fleet.finish(fleet.start("--drain", "--address", "127.0.0.1:1"))
    assert code == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in events[-1]["error"]["message"]


def test_a_public_dashboard_without_a_token_is_refused(fleet):
    fleet.environment |= {"RAY_AUTH_MODE": "disabled", "MERGEFLEET_DASHBOARD_HOST": "0.0.0.0"}
    code, events = fleet.finish(fleet.start("--drain"))
    assert code == 2
    assert "open to anyone" in events[-1]["error"]["message"]


def test_a_ray_directory_too_long_for_its_sockets_is_refused(fleet):
    fleet.environment["MERGEFLEET_RAY_DIRECTORY"] = "/tmp/" + "x" * 60
    code, events = fleet.finish(fleet.start("--drain"))
    assert code == 2
    assert "MERGEFLEET_RAY_DIRECTORY" in events[-1]["error"]["message"]
