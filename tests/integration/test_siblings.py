"""Forms of one merge in one pass: read once, merged once, and each the release it is alone."""

import os
import threading
import time

import pytest

from jobs.errors import FailureClass
from jobs.output_form import OutputForm
from tests.merges import asked, read_tensors
from tests.models import build_llama, make_adapter
from workers.merging.settings import WorkerSettings
from workers.worker import MergeWorker

OUTPUTS = {"bf16": {"dtype": "bfloat16"}} | {
    name.value: {"output": name} for name in OutputForm if name not in (OutputForm.PLAIN, OutputForm.AS_BASE)
}
PARITY = {"level": "arithmetic", "thresholds": {"min_survival": 0}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    base = build_llama(directory / "base", hidden_size=128, intermediate_size=256)
    return base, make_adapter(base, directory / "adapter", targets=["q_proj", "down_proj"], std=0.2)


def requests_for(sources, directory, outputs=OUTPUTS):
    return tuple(asked(sources, directory / name, parity=PARITY, **fields) for name, fields in outputs.items())


def shards_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".safetensors", ".gguf")}


@pytest.fixture(scope="module")
def alone(sources, tmp_path_factory):
    """The shards of each form, merged by itself."""
    directory, found = tmp_path_factory.mktemp("alone"), {}
    places = {name: directory / name for name in ("cache", "scratch", "reports")}
    worker = MergeWorker(WorkerSettings(**places, device="cpu", num_threads=2))
    for request in requests_for(sources, directory):
        (outcome,) = worker.run_unit("alone", (request,)).jobs
        assert outcome.failure is None, outcome.failure
        worker.publish(request.id, None)
        found[request.id] = shards_of(directory / request.id)
    worker.close()
    return found


def num_tensor_bytes(directory):
    return sum(tensor.nbytes for tensor in read_tensors(directory).values())


def test_all_forms_are_one_read_of_base_and_adapter(worker, sources, alone, tmp_path):
    unit = worker.run_unit("unit", requests_for(sources, tmp_path))
    assert [outcome.failure for outcome in unit.jobs] == [None] * len(OUTPUTS)
    assert unit.usage.bytes_read == sum(map(num_tensor_bytes, sources))
    for name in OUTPUTS:
        assert worker.publish(name, None).release.created
        assert shards_of(tmp_path / name) == alone[name]


def test_two_plain_releases_of_one_adapter_are_both_written(worker, sources, alone, tmp_path):
    """At two destinations, with a form beside them that takes the numbers of either."""
    outputs = {"bf16": OUTPUTS["bf16"], "again": OUTPUTS["bf16"], "mxfp4": OUTPUTS["mxfp4"]}
    unit = worker.run_unit("unit", requests_for(sources, tmp_path, outputs))
    assert [outcome.failure for outcome in unit.jobs] == [None] * 3
    for name in outputs:
        assert worker.publish(name, None).release.created
        assert shards_of(tmp_path / name) == alone["bf16" if name == "again" else name]


def test_each_adapter_is_merged_for_its_own_forms(worker, sources, alone, tmp_path):
    base, adapter = sources
    other = make_adapter(base, tmp_path / "other", targets=["q_proj", "down_proj"], std=0.2, seed=7)
    of_other = [
        request.model_copy(update={"id": f"other-{request.id}"})
        for request in requests_for((base, other), tmp_path / "of-other")
    ]
    unit = worker.run_unit("unit", (*requests_for(sources, tmp_path), *of_other))
    assert [outcome.failure for outcome in unit.jobs] == [None] * 2 * len(OUTPUTS)
    assert unit.usage.bytes_read == sum(map(num_tensor_bytes, (base, adapter, other)))
    for name in OUTPUTS:
        for job in (name, f"other-{name}"):
            assert worker.publish(job, None).release.created
        assert shards_of(tmp_path / name) == alone[name] != shards_of(tmp_path / "of-other" / name)


def test_others_go_on_where_the_one_that_merges_is_cancelled(worker, sources, alone, tmp_path, monkeypatch):
    """The plain release's own shards are the numbers: it is cancelled as soon as some are written."""
    pwrite = os.pwrite

    def write(*arguments):
        time.sleep(0.002)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", write)
    outcomes = []
    requests = requests_for(sources, tmp_path, {name: OUTPUTS[name] for name in ("fp8_dynamic", "bf16", "mxfp4")})
    thread = threading.Thread(target=lambda: outcomes.extend(worker.run_unit("unit", requests).jobs))
    thread.start()
    while thread.is_alive():
        if worker.progress().bytes_done > 0:
            worker.cancel(frozenset({"bf16"}))
        time.sleep(0.001)
    thread.join()
    failures = {outcome.job_id: outcome.failure for outcome in outcomes}
    assert failures.pop("bf16").failure_class is FailureClass.CANCELLED
    assert set(failures.values()) == {None}
    for name in failures:
        assert worker.publish(name, None).release.created
        assert shards_of(tmp_path / name) == alone[name]
