"""What a fleet leaves behind for those who ask later: real Ray, one worker, whose process is ended in a merge."""

import json
import os
import signal
import stat
import subprocess

import pytest

from cluster.log_files import driver_log
from tests.integration.test_driver import MERGEFLEET, Fleet
from tests.models import build_llama, make_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def fleet(tmp_path):
    it = Fleet(tmp_path)
    yield it
    it.stop()


@pytest.fixture
def models(tmp_path):
    """A base that takes a worker a few seconds, and the adapters that jobs ask for."""
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
    base = build_llama(tmp_path / "base", max_shard_size="10MB", **shape)
    for number in range(2):
        make_adapter(base, tmp_path / f"adapter-{number}", seed=number)
    return tmp_path


def ask(fleet, *arguments):
    asked = [*MERGEFLEET, *arguments, "--json"]
    done = subprocess.run(asked, env=fleet.environment, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_driver_and_worker_leave_logs_that_tell_what_happened_to_each_job(fleet, models):
    fleet.submit(models, 2)
    run = fleet.start("--drain", "--workers", "1")
    following = subprocess.Popen(
        [*MERGEFLEET, "logs", "job-0", "--follow", "--json"], stdout=subprocess.PIPE, text=True, env=fleet.environment
    )
    fleet.until(lambda: "job-0" in {record.id for record in fleet.merging()}, "its merge")
    os.kill(fleet.pid_at(run, "job-0"), signal.SIGKILL)
    code, _ = fleet.finish(run)
    assert code == 0

    logs = fleet.home / "fleet" / "logs"
    [begun, *_] = [event.detail for event in fleet.store.events("job-0") if event.state == "PLANNING"]
    assert {path.name for path in logs.iterdir()} == {driver_log(begun["owner"]), begun["log"]}
    assert begun["log"].split("@")[:2] == ["merge-worker-0", begun["node"]]
    assert stat.S_IMODE(logs.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in logs.iterdir()} == {0o600}
    # Each line whole, though processes were forked to try files out and one was killed.
    written = [json.loads(line) for path in logs.iterdir() for line in path.read_text().splitlines()]
    assert {line["logger"].partition(".")[0] for line in written} <= {"jobs", "workers", "cluster"}

    lines = ask(fleet, "logs", "job-0")
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    told = [(line["file"].partition("@")[0], line["message"]) for line in lines]
    expected = [
        ("driver", "unit started"),
        ("merge-worker-0", "unit begun"),
        ("driver", "worker lost with its jobs"),
        ("merge-worker-0", "unit done"),
        ("driver", "job settled"),
    ]
    found = iter(told)
    assert all(each in found for each in expected), told
    at_work = [line for line in lines if line["logger"].startswith("workers.") and line["message"] == "stage begun"]
    assert at_work
    assert all(line["unit"].startswith("merge:base") and "job-0" in line["job_ids"] for line in at_work)
    assert lines[-1]["state"] == "PUBLISHED"

    followed = [json.loads(line) for line in following.communicate(timeout=60)[0].splitlines()]
    assert following.returncode == 0
    key = {(line["at"], line["message"]) for line in lines}
    assert {(line["at"], line["message"]) for line in followed} == key
    assert len(followed) == len(key)

    (logs / begun["log"]).unlink()
    missing = [line for line in ask(fleet, "logs", "job-0") if "missing" in line]
    assert missing == [{"missing": begun["log"], "node": begun["node"]}]
