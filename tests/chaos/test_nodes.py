"""One merge on several Ray nodes at once: spread over all of them, its bytes those of one worker, whoever dies."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import JobState
from tests.models import build_llama, make_adapter
from tests.releases import left_in
from workers.merging.settings import WorkerSettings
from workers.worker import MergeWorker

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of many shards that keeps a worker for some seconds, and an adapter for it."""
    directory = tmp_path_factory.mktemp("models")
    base = build_llama(
        directory / "base", hidden_size=384, intermediate_size=1024, num_hidden_layers=16, max_shard_size="3MB"
    )
    make_adapter(base, directory / "adapter")
    assert len(list(base.glob("*.safetensors"))) >= 16
    return directory


def request(models, job_id, destination, quantization):
    return MergeRequest(
        id=job_id,
        base=str(models / "base"),
        adapter=str(models / "adapter"),
        destination=str(destination),
        base_quantization=quantization,
        parity={"level": "arithmetic"},
    )


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def run_nodes(home, num_nodes, *options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MERGEFLEET_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.nodes", home, str(num_nodes), *options],
        cwd=ROOT,
        env=environment | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("num_nodes", "quantization", "options"),
    [
        (2, "none", ()),
        (3, "nf4", ()),
        (4, "none", ()),
        (4, "nf4", ("--by", "cpu")),
        (3, "none", ("--kill",)),
        (2, "nf4", ("--kill",)),
    ],
)
def test_one_merge_is_spread_over_all_nodes(models, tmp_path, num_nodes, quantization, options):
    alone = MergeWorker(
        WorkerSettings(
            cache=tmp_path / "cache", scratch=tmp_path / "scratch", reports=tmp_path / "reports", device="cpu"
        )
    )
    with contextlib.closing(alone):
        alone.run_unit("unit", (request(models, "one", tmp_path / "alone", quantization),))
        assert alone.publish("one").release.created

    home = tmp_path / "home"
    home.mkdir()
    with contextlib.closing(JobStore(f"sqlite:///{home}/mergefleet.db")) as store:
        store.submit([request(models, "one", tmp_path / "releases" / "one", quantization)])
        events = run_nodes(home, num_nodes, *options)
        (record,) = store.jobs()

    nodes = {event["worker"]: event["node"] for event in events if event["event"] == "place"}
    assert len(set(nodes.values())) == num_nodes
    started = [event for event in events if event["event"] == "shards_started"]
    assert {nodes[event["worker"]] for event in started} == set(nodes.values())
    assert (record.state, record.attempts, record.worker_losses) == (JobState.PUBLISHED, 1, 0)
    assert digests(tmp_path / "releases" / "one") == digests(tmp_path / "alone")
    assert [path.name for path in (tmp_path / "releases").iterdir()] == ["one"]
    assert left_in(home / "scratch") == []

    names = [name for event in started for name in event["shards"]]
    replaced = [event for event in events if event["event"] == "worker_replaced"]
    if "--kill" in options:
        # Only what the dead worker was at is done again.
        assert len(replaced) == 1
        again = {name for name in names if names.count(name) > 1}
        assert again == {name for event in started[:1] for name in event["shards"]}
    else:
        assert replaced == []
        assert len(names) == len(set(names)) == len(list((models / "base").glob("*.safetensors")))


def test_a_fleet_of_nodes_with_and_without_gpus_works_on_where_they_can_be_used(models, tmp_path):
    """Ray hands out GPUs that are not there: what nodes look like whose driver does not fit."""
    home = tmp_path / "home"
    home.mkdir()
    with contextlib.closing(JobStore(f"sqlite:///{home}/mergefleet.db")) as store:
        store.submit([request(models, name, tmp_path / "releases" / name, "none") for name in ("one", "two")])
        events = run_nodes(home, 2, "--mixed")
        records = store.jobs()
    assert [(each.state, each.attempts, each.worker_losses) for each in records] == [(JobState.PUBLISHED, 1, 0)] * 2
    assert {event["worker"] for event in events if event["event"] == "unit_started"} == {"merge-worker-1"}
    assert [event["worker"] for event in events if event["event"] == "place"] == ["merge-worker-1"]
    (benched,) = [event for event in events if event["event"] == "worker_benched"]
    assert benched["worker"] == "merge-worker-0"
    assert "device 'cuda' cannot be used" in benched["reason"]
    assert not [event for event in events if event["event"] == "worker_replaced"]
