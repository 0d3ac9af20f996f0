"""`kill -9` of a worker and of the driver in the middle of a batch of twelve: run again, and all is as it should be."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from jobs.errors import FailureClass
from jobs.ledger.store import JobStore
from jobs.states import JobState
from tests.models import build_tokenizer, make_adapter
from tests.releases import left_in
from workers.bases.model import quiet_transformers

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(1800)]

MERGEFLEET = Path(sys.executable).with_name("mergefleet")
ROOT = Path(__file__).parents[2]
NUM_JOBS = 12
RUN_SECONDS = 900


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Two bases large enough to be caught at work, and six adapters for each."""
    directory = tmp_path_factory.mktemp("batch")
    adapters = {}
    for seed, name in enumerate(("north", "south")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        base = directory / name
        with quiet_transformers():
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="20MB")
        build_tokenizer(base)
        adapters[base] = [make_adapter(base, directory / f"{name}-{n}", seed=n) for n in range(NUM_JOBS // 2)]
    return adapters


@pytest.fixture
def fleet(tmp_path, batch, s3):
    """A store with twelve jobs, half for S3 and half for a directory, and the environment of a driver."""
    requests = []
    for base, adapters in batch.items():
        for number, adapter in enumerate(adapters):
            place = f"s3://{s3.bucket}/{tmp_path.name}" if number % 2 else str(tmp_path / "releases")
            requests.append(
                {
                    "id": adapter.name,
                    "base": str(base),
                    "adapter": str(adapter),
                    "destination": f"{place}/{adapter.name}",
                    "base_quantization": "nf4" if base.name == "north" else "none",
                }
            )
    (tmp_path / "batch.yaml").write_text(yaml.safe_dump({"requests": requests}))
    environment = os.environ | {
        "MERGEFLEET_HOME": str(tmp_path / "home"),
        "MERGEFLEET_RAY_DIRECTORY": f"/tmp/mf-chaos-{os.getpid()}",
        "MERGEFLEET_LEASE_SECONDS": "5",
        "MERGEFLEET_MAX_JOBS_PER_PASS": "2",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "releases").mkdir()
    command(environment, "submit", tmp_path / "batch.yaml")
    return tmp_path, environment


def command(environment, *arguments, expect=0):
    done = subprocess.run(
        [MERGEFLEET, *map(str, arguments), "--json"],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == expect, done.stderr
    return done.stdout


def start_driver(home, environment):
    with (home / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [MERGEFLEET, "run", "--drain", "--workers", "2", "--json"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )


def states(store):
    return {record.id: record.state for record in store.jobs()}


def wait_until(condition, driver, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.05)


def workers_of(driver):
    """Return the actors' processes: Ray names a process after the actor, or after the task it is at."""
    found = []
    for child in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(child.cmdline())
            if title.startswith("ray::") and "merge" in title.lower():
                found.append(child)
    return found


def test_kill_of_worker_and_driver_mid_batch(fleet, s3):
    home, environment = fleet
    store = JobStore(f"sqlite:///{home / 'home' / 'mergefleet.db'}")
    driver = start_driver(home, environment)
    try:
        wait_until(lambda: JobState.MERGING in states(store).values() and workers_of(driver), driver)
        os.kill(workers_of(driver)[0].pid, signal.SIGKILL)
        wait_until(lambda: any(record.failure_class is FailureClass.WORKER_LOST for record in store.jobs()), driver)
        at_work = {JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING}
        wait_until(lambda: JobState.PUBLISHED in states(store).values() and at_work & {*states(store).values()}, driver)
        workers = workers_of(driver)
        driver.kill()
        driver.wait()
    finally:
        if driver.poll() is None:
            driver.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert workers
    assert not alive
    assert len([state for state in states(store).values() if state is JobState.PUBLISHED]) < NUM_JOBS

    command(environment, "run", "--drain", "--workers", "2")

    records = store.jobs()
    assert {record.state for record in records} == {JobState.PUBLISHED}
    assert len(records) == NUM_JOBS
    for record in records:
        published = [event for event in store.events(record.id) if event.state is JobState.PUBLISHED]
        assert len(published) == 1
        verified = json.loads(command(environment, "verify", record.release.location))
        assert str(record.merge_key) in json.dumps(verified)
    assert sorted(path.name for path in (home / "releases").iterdir()) == sorted(
        record.id for record in records if not str(record.release.location).startswith("s3://")
    )
    assert left_in(home / "home" / "scratch") == []
    client = s3.client()
    assert client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", []) == []
    manifests = [
        item["Key"]
        for item in client.list_objects_v2(Bucket=s3.bucket, Prefix=home.name)["Contents"]
        if item["Key"].endswith("manifest.json")
    ]
    assert len(manifests) == NUM_JOBS // 2
