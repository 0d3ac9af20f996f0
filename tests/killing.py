"""Attempts that are killed, and what comes after them: for tests that look with other eyes than the worker's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

from jobs.request import MergeRequest
from tests.contract.places import DirectoryPlace
from tests.dying import settings_in
from tests.releases import left_in
from workers.releases.delivery import pull_release, verify_release
from workers.releases.sinks.local_records import RECORDS_DIRECTORY
from workers.worker import MergeWorker

ROOT = Path(__file__).parents[2]
ARITHMETIC = {"level": "arithmetic"}
FULL = {"prompts": ["The capital of France is"], "max_new_tokens": 2, "min_positions": 1}


def requests_for(sources, destinations, **fields):
    base, adapter = sources
    defaults = {"base_quantization": "none", "parity": ARITHMETIC}
    return tuple(
        MergeRequest(
            id=f"job-{number}", base=str(base), adapter=str(adapter), destination=str(each), **defaults | fields
        )
        for number, each in enumerate(destinations)
    )


def adapter_bytes(adapter):
    return (adapter / "adapter_model.safetensors").stat().st_size


def files_below(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def killed(place, requests, die, after=0):
    """Run a worker that kills itself."""
    told = {"directory": str(place.scratch.parent), "die": die, "after": after}
    told["requests"] = [request.model_dump(mode="json", by_alias=True) for request in requests]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.dying", json.dumps(told)]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert place.leftovers() != []


def merged_again(place, requests):
    """Run a worker that lives, with the directories of the one that died; return what it took."""
    worker = MergeWorker(settings_in(place.scratch.parent))
    outcome = worker.run_unit("unit", requests)
    assert [job.failure for job in outcome.jobs] == [None] * len(requests)
    for request in requests:
        published = worker.publish(request.id)
        assert published.failure is None
        assert published.release.created
    worker.close()
    return outcome.usage


def assert_whole(place, expected, tmp_path):
    """Check that what can be seen is the release, bit for bit, and that nothing else is left anywhere."""
    verify_release(place.location, place.scratch)
    pull_release(place.location, tmp_path / "pulled")
    assert files_below(tmp_path / "pulled") == expected
    assert left_in(place.scratch) == []
    assert place.leftovers() == []


def tensor_bytes(base):
    """Return the bytes of the tensors of each shard."""
    sizes = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            sizes[path.name] = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - no mapping
    return sizes


def finished_in(place):
    """Return the names of recorded shards in the directories of dead stagings, by staging."""
    parent = place.location.path.parent if isinstance(place, DirectoryPlace) else place.scratch
    found = {}
    for path in sorted(parent.glob(f"*/{RECORDS_DIRECTORY}/*.json")):
        found.setdefault(path.parents[1], {})[json.loads(path.read_bytes()[65:])["artifact"]["path"]] = path
    return found
