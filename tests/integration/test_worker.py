"""The worker: units from request to release, with everything real but the faults."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import workers.merging.base_plan
import workers.unit.admission
import workers.unit.unit
import workers.unit.verification
from jobs.allowance import Allowance, Pattern
from jobs.errors import BadInputError, FailureClass
from jobs.parity_report import ParityReport
from jobs.release import Manifest
from jobs.request import MergeRequest
from tests.merges import different, merge_by_peft, open_descriptors, read_tensors
from tests.models import build_bnb_4bit, build_llama, build_qwen2, make_adapter
from tests.stored import twin_of
from tests.stored.forms import LINEAR
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.adapters.config import ADAPTER_CONFIG
from workers.bases.model import quiet_transformers
from workers.files.checkpoint import read_shard
from workers.merging.base_plan import plan_base
from workers.merging.plan import plan_merge
from workers.releases.sinks.directory import DirectoryStaging
from workers.sources.fetch import fetch_adapter, fetch_base
from workers.unit.footprint import device_bytes, pass_bytes, passing_bytes, resident_bytes
from workers.worker import MergeWorker

ARITHMETIC = {"level": "arithmetic"}
FULL = {"prompts": ["The capital of France is"], "max_new_tokens": 2, "min_positions": 1}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="module")
def base(places):
    return build_llama(places / "llama", max_shard_size="100KB")


@pytest.fixture(scope="module")
def adapters(places, base):
    return {
        "one": make_adapter(base, places / "one"),
        "two": make_adapter(base, places / "two", rank=4, targets=["q_proj", "v_proj"], seed=2),
        "three": make_adapter(base, places / "three", rank=3, alpha=5, rslora=True, seed=3),
    }


@pytest.fixture
def request_for(base, tmp_path):
    """Make a request; arithmetic parity and the base's own weights unless it says otherwise."""

    def make(job_id, adapter, **fields):
        defaults = {
            "base": str(base),
            "destination": str(tmp_path / "releases" / job_id),
            "base_quantization": "none",
            "parity": ARITHMETIC,
        }
        return MergeRequest(id=job_id, adapter=str(adapter), **defaults | fields)

    return make


@pytest.fixture
def requests(request_for, adapters):
    return tuple(request_for(name, adapter) for name, adapter in adapters.items())


def run(worker, *requests):
    return {job.job_id: job for job in worker.run_unit("unit", requests).jobs}


def left_over(tmp_path):
    """Return what is left of a worker, but caches, reports and published releases."""
    found = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    releases = list((tmp_path / "releases").iterdir()) if (tmp_path / "releases").exists() else []
    return found + [path for path in releases if not (path / "manifest.json").is_file()]


def assert_published(release, base, adapter, tmp_path, **reference):
    """Check a release from its files alone."""
    directory = release.location.path
    manifest = Manifest.model_validate_json((directory / "manifest.json").read_bytes())
    assert manifest == release.manifest
    assert hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest() == release.manifest_sha256
    found = {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert {artifact.path: artifact.sha256 for artifact in manifest.files} == found
    expected = merge_by_peft(base, adapter, tmp_path / "peft" / directory.name, **reference)
    assert different(read_tensors(directory), expected) == []


def test_a_unit_becomes_releases(worker, requests, base, adapters, tmp_path):
    before = open_descriptors()
    outcomes = run(worker, *requests)
    assert {job_id: job.failure for job_id, job in outcomes.items()} == dict.fromkeys(adapters)
    assert not any((tmp_path / "releases" / name).exists() for name in adapters)
    for name, adapter in adapters.items():
        outcome = worker.publish(name)
        assert outcome.failure is None
        assert outcome.release.created
        assert outcome.release.manifest.merge_key == outcomes[name].merge_key
        assert_published(outcome.release, base, adapter, tmp_path)
    assert left_over(tmp_path) == []
    assert open_descriptors() <= before


def test_a_release_is_loaded_by_plain_transformers(worker, request_for, adapters):
    run(worker, request_for("job", adapters["one"], base_quantization="nf4"))
    directory = worker.publish("job").release.location.path
    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert not hasattr(model.config, "quantization_config")
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("owner", ["base", "adapter"])
def test_a_tokenizer_that_does_not_load_is_named_before_anything_is_merged(
    worker, request_for, base, adapters, tmp_path, monkeypatch, owner
):
    places = {
        "base": shutil.copytree(base, tmp_path / "b"),
        "adapter": shutil.copytree(adapters["two"], tmp_path / "a"),
    }
    if owner == "adapter":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / name, places["adapter"])
    (places[owner] / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nope"}}')
    monkeypatch.setattr(workers.unit.unit, "run_pass", None)
    asked = request_for("job", places["adapter"], base=str(places["base"]), parity=FULL)
    failure = run(worker, asked)["job"].failure
    assert failure.failure_class is FailureClass.BAD_INPUT
    assert failure.message.startswith(f"{places[owner]}: transformers cannot load its tokenizer")
    assert left_over(tmp_path) == []


def test_full_parity_of_a_pass_through_4_bits(worker, request_for, adapters, tmp_path):
    requests = [request_for(name, adapter, base_quantization="nf4", parity=FULL) for name, adapter in adapters.items()]
    outcomes = run(worker, *requests)
    for name, job in outcomes.items():
        assert job.failure is None, job.failure
        assert (job.parity.level, job.parity.num_changed_tensors) == ("full", 4 if name == "two" else 14)
        assert job.parity.rounding_excess <= 1
        assert job.parity.mean_kl < 1e-3
        release = worker.publish(name).release
        assert release.manifest.parity == job.parity
        report = ParityReport.model_validate_json((release.location.path / "parity.json").read_bytes())
        assert report.passed
        assert report.request_id == name
        assert any(check.gates for check in report.behaviour)
        assert (job.report_path / "parity.html").read_bytes() == (release.location.path / "parity.html").read_bytes()
    assert left_over(tmp_path) == []


def test_a_tied_base_and_a_base_stored_in_4_bits(worker, request_for, base, adapters, tmp_path):
    qwen2 = build_qwen2(tmp_path / "qwen2")
    adapter = make_adapter(qwen2, tmp_path / "for-qwen2")
    assert run(worker, request_for("tied", adapter, base=str(qwen2), parity=FULL))["tied"].failure is None
    assert_published(worker.publish("tied").release, qwen2, adapter, tmp_path)
    stored = build_bnb_4bit(base, tmp_path / "bnb")
    request = request_for("stored", adapters["one"], base=str(stored), base_quantization="nf4", parity=FULL)
    assert run(worker, request)["stored"].failure is None
    assert_published(worker.publish("stored").release, stored, adapters["one"], tmp_path, dequantize=True)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("fp8 with one scale", "FP8, dequantized, + adapter"),
        ("compressed-tensors int4 by group", "compressed-tensors pack-quantized, dequantized, + adapter"),
        (
            "ModelOpt nvfp4",
            "FP8 or NVFP4 of ModelOpt, dequantized by mergefleet as transformers does not read it, + adapter",
        ),
    ],
)
def test_a_base_in_a_form_is_asked_as_it_is_dequantized_and_read_once(worker, request_for, tmp_path, form, words):
    """By transformers, where that reads it. Its own weights are what is added to where a request does not say."""
    plain = build_llama(tmp_path / "plain")
    base = LINEAR[form](plain, tmp_path / "stored")
    adapter = make_adapter(plain, tmp_path / "adapter-of-it")
    request = request_for("stored", adapter, base=str(base), base_quantization="default", parity=FULL)
    unit = worker.run_unit("unit", [request])
    (outcome,) = unit.jobs
    assert outcome.failure is None
    report = ParityReport.model_validate_json((outcome.report_path / "parity.json").read_bytes())
    assert report.base_quantization == "stored"
    assert [check.reference for check in report.behaviour] == [f"the base as stored, in {words}"]
    sizes = (spec.num_bytes for directory in (base, adapter) for spec in specs_of(directory))
    assert unit.usage.bytes_read == sum(sizes)
    assert_published(worker.publish("stored").release, twin_of(base), adapter, tmp_path)
    assert not left_over(tmp_path)


def specs_of(directory):
    return [spec for file in directory.glob("*.safetensors") for spec in read_shard(file).tensors]


def damaged_adapters(adapters, tmp_path):
    """Return adapters that cannot be merged, by name, with the class of their failure and a phrase of its message."""

    def copy(name, change=None, **config):
        adapter = shutil.copytree(adapters["one"], tmp_path / name)
        if change is not None:
            tensors = load_file(adapter / ADAPTER_WEIGHTS)
            change(tensors)
            save_file(tensors, adapter / ADAPTER_WEIGHTS)
        written = json.loads((adapter / ADAPTER_CONFIG).read_text()) | config
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(written))
        return adapter

    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"

    def set_nan(tensors):
        tensors[name][3, 1] = float("nan")

    other = build_llama(tmp_path / "other-base", hidden_size=32, tokenizer=False)
    truncated = copy("truncated")
    (truncated / ADAPTER_WEIGHTS).write_bytes((truncated / ADAPTER_WEIGHTS).read_bytes()[:-5])
    bad_input = FailureClass.BAD_INPUT
    return {
        "missing": (tmp_path / "missing", FailureClass.NOT_FOUND, "missing is no directory"),
        "nan": (copy("nan", set_nan), bad_input, f"tensor {name}: expected finite numbers"),
        "left-over": (copy("left-over", lambda t: t.update(extra=torch.zeros(1))), bad_input, "1 tensors belong to"),
        "half": (copy("half", lambda t: t.pop(name)), bad_input, f"expected tensor {name}"),
        "dora": (copy("dora", use_dora=True), bad_input, "lora_magnitude_vector"),
        "unknown": (copy("unknown", surprise=1), bad_input, "surprise = 1 is unknown to PEFT"),
        "nothing": (copy("nothing", target_modules=["c_attn"]), bad_input, "does not fit this base"),
        "truncated": (truncated, bad_input, "truncated"),
        "other": (make_adapter(other, tmp_path / "other"), bad_input, "trained on another base"),
    }


def test_each_bad_job_fails_alone_with_its_class(worker, requests, request_for, base, adapters, tmp_path):
    cases = damaged_adapters(adapters, tmp_path / "adapters")
    bad = [request_for(name, adapter) for name, (adapter, _, _) in cases.items()]
    occupied = tmp_path / "releases" / "occupied"
    occupied.mkdir(parents=True)
    (occupied / "precious.txt").write_text("mine")
    bad.append(request_for("occupied", adapters["one"]))
    cases["occupied"] = (None, FailureClass.BAD_INPUT, "precious.txt")
    before = open_descriptors()
    outcomes = run(worker, bad[0], requests[0], *bad[1:5], requests[1], *bad[5:], requests[2])
    for name, (_, failure_class, phrase) in cases.items():
        failure = outcomes[name].failure
        assert failure.failure_class is failure_class, failure
        assert phrase in failure.message
    for name, adapter in adapters.items():
        assert outcomes[name].failure is None
        assert_published(worker.publish(name).release, base, adapter, tmp_path)
    assert [path.name for path in left_over(tmp_path)] == ["occupied"]
    assert (occupied / "precious.txt").read_text() == "mine"
    assert open_descriptors() <= before


@pytest.mark.parametrize(
    ("damage", "failure_class", "phrase"),
    [
        (shutil.rmtree, FailureClass.NOT_FOUND, "no directory"),
        (lambda base: (base / "config.json").unlink(), FailureClass.NOT_FOUND, "config.json"),
        (lambda base: (base / "config.json").write_text("{"), FailureClass.BAD_INPUT, "config.json"),
        (lambda base: min(base.glob("*.safetensors")).unlink(), FailureClass.NOT_FOUND, "model-00001-of"),
        (lambda base: os.truncate(min(base.glob("*.safetensors")), 99_000), FailureClass.BAD_INPUT, "truncated"),
        (
            lambda base: (base / "config.json").write_text(
                json.dumps(
                    json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
                )
            ),
            FailureClass.BAD_INPUT,
            "'gptq'",
        ),
    ],
    ids=["gone", "no config", "config is no JSON", "shard missing", "shard truncated", "gptq"],
)
def test_a_bad_base_fails_all_its_jobs(worker, request_for, base, adapters, tmp_path, damage, failure_class, phrase):
    bad = shutil.copytree(base, tmp_path / "bad")
    damage(bad)
    outcomes = run(worker, *(request_for(name, adapter, base=str(bad)) for name, adapter in adapters.items()))
    for job in outcomes.values():
        assert job.failure.failure_class is failure_class, job.failure
        assert phrase in job.failure.message
    assert left_over(tmp_path) == []


def test_a_base_that_changes_after_the_plan_fails_all_its_jobs_and_says_so(
    worker, request_for, base, adapters, tmp_path, monkeypatch
):
    changing = shutil.copytree(base, tmp_path / "changing")
    really = workers.unit.unit.run_pass

    def run_pass(*args, **kwargs):
        os.truncate(min(changing.glob("*.safetensors")), 70_000)
        return really(*args, **kwargs)

    monkeypatch.setattr(workers.unit.unit, "run_pass", run_pass)
    before = open_descriptors()
    outcomes = run(worker, *(request_for(name, adapter, base=str(changing)) for name, adapter in adapters.items()))
    for job in outcomes.values():
        assert job.failure.failure_class is FailureClass.TRANSIENT_IO, job.failure
        assert "was changed while it was read" in job.failure.message
    assert left_over(tmp_path) == []
    assert open_descriptors() <= before


def with_damage_after_the_merge(monkeypatch, damage):
    """Damage the merged files of one job before they are verified."""
    really = workers.unit.unit.run_pass

    def run_pass(base, quantized, weights, jobs, *args, **kwargs):
        result = really(base, quantized, weights, jobs, *args, **kwargs)
        damage({job.id: job.directory for job in jobs})
        return result

    monkeypatch.setattr(workers.unit.unit, "run_pass", run_pass)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("what", ["base", "adapter"])
@pytest.mark.parametrize("when", ["before the merge", "after it"])
def test_what_is_rewritten_while_it_is_merged_is_read_anew(
    worker, request_for, adapters, base, tmp_path, monkeypatch, what, when, quantization
):
    """The same size, and the time set back: what ships would stand under the digest of other bytes."""
    places = {
        "base": shutil.copytree(base, tmp_path / "base"),
        "adapter": shutil.copytree(adapters["two"], tmp_path / "a"),
    }
    path = min(places[what].glob("*.safetensors"))
    really = workers.unit.unit.run_pass

    def rewrite():
        status = path.stat()
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def run_pass(*arguments, **options):
        if when == "before the merge":
            rewrite()
        try:
            return really(*arguments, **options)
        finally:
            if when == "after it":
                rewrite()

    monkeypatch.setattr(workers.unit.unit, "run_pass", run_pass)
    request = request_for("job", places["adapter"], base=str(places["base"]), base_quantization=quantization)
    outcome = run(worker, request)["job"]
    assert outcome.failure.failure_class is FailureClass.TRANSIENT_IO, outcome.failure
    assert f"{path} was changed while it was read" in outcome.failure.message
    assert left_over(tmp_path) == []
    monkeypatch.setattr(workers.unit.unit, "run_pass", really)
    assert run(worker, request)["job"].failure is None


def test_a_flipped_byte_is_not_published(worker, requests, base, adapters, tmp_path, monkeypatch):
    def flip(directories):
        path = min(directories["two"].glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-100] ^= 0x40
        path.write_bytes(data)

    with_damage_after_the_merge(monkeypatch, flip)
    outcomes = run(worker, *requests)
    failure = outcomes["two"].failure
    assert failure.failure_class is FailureClass.PARITY_FAILED
    report = ParityReport.model_validate_json((outcomes["two"].report_path / "parity.json").read_bytes())
    assert not report.passed
    (reason,) = report.failures
    assert reason in failure.message
    (wrong,) = [check for check in report.tensors if check.num_bad_elements]
    assert f"tensor {wrong.tensor}: 1 elements" in reason
    assert "parity.html" in {path.name for path in outcomes["two"].report_path.iterdir()}
    assert not (tmp_path / "releases" / "two").exists()
    for name in ("one", "three"):
        assert_published(worker.publish(name).release, base, adapters[name], tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_half_a_scaling_is_not_published(worker, request_for, adapters, tmp_path, monkeypatch, quantization):
    really = workers.unit.unit.run_pass

    def run_pass(base, quantized, weights, jobs, *args, **kwargs):
        (wrong,) = [job for job in jobs if job.id == "wrong"]
        deltas = {
            name: dataclasses.replace(delta, scaling=delta.scaling / 2) for name, delta in wrong.plan.deltas.items()
        }
        wrong.part = dataclasses.replace(wrong.plan, deltas=deltas)
        result = really(base, quantized, weights, jobs, *args, **kwargs)
        wrong.part = None
        return result

    monkeypatch.setattr(workers.unit.unit, "run_pass", run_pass)
    requests = [
        request_for("wrong", adapters["two"], base_quantization=quantization, parity=FULL),
        request_for("right", adapters["two"], base_quantization=quantization, parity=FULL),
    ]
    outcomes = run(worker, *requests)
    assert outcomes["right"].failure is None, outcomes["right"].failure
    assert outcomes["wrong"].failure.failure_class is FailureClass.PARITY_FAILED
    assert "_proj.weight" in outcomes["wrong"].failure.message
    report = ParityReport.model_validate_json((outcomes["wrong"].report_path / "parity.json").read_bytes())
    assert {check.tensor for check in report.tensors if check.num_bad_elements} == {
        f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in ("q_proj", "v_proj")
    }
    assert [check.survival for check in report.tensors if check.changed] == pytest.approx([0.5] * 4, abs=0.02)
    assert not (tmp_path / "releases" / "wrong").exists()


def test_a_shard_cut_short_is_not_published(worker, requests, monkeypatch):
    def cut(directories):
        path = min(directories["one"].glob("*.safetensors"))
        os.truncate(path, path.stat().st_size - 10)

    with_damage_after_the_merge(monkeypatch, cut)
    outcomes = run(worker, *requests)
    assert outcomes["one"].failure.failure_class is FailureClass.PARITY_FAILED
    assert "truncated or corrupt" in outcomes["one"].failure.message
    assert [outcomes[name].failure for name in ("two", "three")] == [None, None]


def test_a_second_publish_publishes_nothing(worker, requests, tmp_path):
    run(worker, *requests)
    assert worker.publish("one").release.created
    published = sorted((tmp_path / "releases" / "one").iterdir())
    again = worker.publish("one")
    assert again.release is None
    assert "job one is not staged here" in again.failure.message
    assert sorted((tmp_path / "releases" / "one").iterdir()) == published


def test_discarding_leaves_nothing_and_may_be_repeated(worker, requests, tmp_path):
    run(worker, *requests)
    for name in ("one", "one", "two", "three", "never heard of"):
        worker.discard(name)
    assert left_over(tmp_path) == []
    assert worker.publish("one").failure.failure_class is FailureClass.INTERNAL


def test_closing_drops_what_is_staged(worker, requests, tmp_path):
    run(worker, *requests)
    worker.close()
    worker.close()
    assert left_over(tmp_path) == []


def test_the_same_request_again_finds_its_release(worker, requests, tmp_path):
    run(worker, *requests)
    first = {name: worker.publish(name).release for name in ("one", "two")}
    worker.discard("three")
    unit = worker.run_unit("again", requests)
    outcomes = {job.job_id: job for job in unit.jobs}
    for name, release in first.items():
        assert outcomes[name].release.created is False
        assert outcomes[name].release.manifest_sha256 == release.manifest_sha256
        assert outcomes[name].failure is None
    assert (outcomes["three"].release, outcomes["three"].failure) == (None, None)
    assert worker.publish("three").release.created
    everything_there = worker.run_unit("third time", requests)
    assert all(job.release is not None for job in everything_there.jobs)
    assert everything_there.usage.bytes_written == 0
    assert left_over(tmp_path) == []


def test_the_same_release_in_the_meantime_is_a_success(worker, settings, requests, tmp_path):
    run(worker, *requests)
    other = MergeWorker(dataclasses.replace(settings, scratch=tmp_path / "scratch" / "other"))
    run(other, *requests)
    assert other.publish("one").release.created
    assert worker.publish("one").release.created is False
    other.close()
    worker.close()
    assert left_over(tmp_path) == []


def test_something_else_in_the_meantime_is_not_overwritten(worker, requests, tmp_path):
    run(worker, *requests)
    (tmp_path / "releases" / "one").mkdir()
    (tmp_path / "releases" / "one" / "precious.txt").write_text("mine")
    outcome = worker.publish("one")
    assert outcome.failure.failure_class is FailureClass.BAD_INPUT
    assert [path.name for path in (tmp_path / "releases" / "one").iterdir()] == ["precious.txt"]
    assert worker.publish("two").release.created
    worker.discard("three")
    assert [path.name for path in left_over(tmp_path)] == ["one"]


def test_a_job_that_comes_again_takes_the_place_of_its_staged_self(worker, requests, tmp_path):
    for _ in range(2):
        run(worker, *requests)
    assert len(list((tmp_path / "releases").glob(".*.staging-*[0-9a-f]"))) == 3
    assert worker.publish("one").release.created
    worker.close()
    assert left_over(tmp_path) == []


@pytest.fixture
def slow_disk(monkeypatch):
    """Every write takes five milliseconds, so that there is a middle of the merge."""
    pwrite = os.pwrite

    def write(*arguments):
        time.sleep(0.005)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", write)


def run_beside(worker, requests, at_work, until):
    """Run a unit in a thread and call `at_work` with its progress again and again, until it says it is done."""
    outcomes = {}
    thread = threading.Thread(target=lambda: outcomes.update(run(worker, *requests)))
    thread.start()
    done = False
    while thread.is_alive():
        done = done or at_work(worker.progress()) is until
        time.sleep(0.001)
    thread.join()
    return outcomes


@pytest.mark.usefixtures("slow_disk")
def test_a_job_cancelled_in_the_middle_stops_alone(worker, requests, base, adapters, tmp_path):
    def cancel(progress):
        if progress.bytes_done > 0:
            worker.cancel(frozenset({"three"}))

    outcomes = run_beside(worker, requests, cancel, until=True)
    assert outcomes["three"].failure.failure_class is FailureClass.CANCELLED
    for name in ("one", "two"):
        assert outcomes[name].failure is None
        assert_published(worker.publish(name).release, base, adapters[name], tmp_path)
    assert left_over(tmp_path) == []
    # Asked for again, it runs: what was cancelled was that attempt.
    assert run(worker, requests[2])["three"].failure is None
    assert worker.publish("three").release.created


def test_a_job_cancelled_while_it_is_verified_is_not_staged(worker, requests, tmp_path, monkeypatch):
    really = workers.unit.unit.run_pass

    def run_pass(*arguments, **options):
        result = really(*arguments, **options)
        worker.cancel(frozenset({"two"}))
        return result

    monkeypatch.setattr(workers.unit.unit, "run_pass", run_pass)
    outcomes = run(worker, *requests)
    assert outcomes["two"].failure.failure_class is FailureClass.CANCELLED
    assert [outcomes[name].failure for name in ("one", "three")] == [None, None]
    worker.close()
    assert left_over(tmp_path) == []


@pytest.mark.usefixtures("slow_disk")
def test_a_unit_cancelled_in_the_middle_stops_early(worker, requests, tmp_path):
    def cancel(progress):
        if progress.bytes_done > 0:
            worker.cancel(frozenset({"one", "two", "three"}))

    before = open_descriptors()
    outcomes = run_beside(worker, requests, cancel, until=True)
    assert {job.failure.failure_class for job in outcomes.values()} == {FailureClass.CANCELLED}
    assert left_over(tmp_path) == []
    assert open_descriptors() <= before
    progress = worker.progress()
    assert progress.stages == dict.fromkeys(("one", "two", "three"), "failed")
    assert progress.bytes_done < progress.bytes_total / 2


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("parity", [ARITHMETIC, FULL])
def test_progress_goes_on_and_ends_at_its_total(worker, request_for, adapters, parity):
    requests = [request_for(name, adapter, parity=parity, dtype="float32") for name, adapter in adapters.items()]
    seen = []
    run_beside(worker, requests, seen.append, until=True)
    last = worker.progress()
    seen.append(last)
    begun = [each for each in seen if each.unit == "unit"]
    assert [each.bytes_done for each in begun] == sorted(each.bytes_done for each in begun)
    assert len({each.bytes_done for each in begun}) > 5
    assert all(each.bytes_done <= each.bytes_total for each in begun if each.bytes_total)
    assert last.bytes_done == last.bytes_total > 0
    assert last.stages == dict.fromkeys(adapters, "staged")
    assert {"merge", "verify"} <= {stage for each in begun for stage in each.stages.values()}
    worker.publish("one")
    assert worker.progress().stages["one"] == "published"


def test_nobody_waits_for_uploads_of_jobs_that_failed(worker, requests, tmp_path, monkeypatch):
    put, run_pass, started = DirectoryStaging.put, workers.unit.unit.run_pass, []

    def slow_put(staging, artifact):
        started.append(artifact.path)
        time.sleep(0.2)
        put(staging, artifact)

    def failing_pass(*arguments, **options):
        run_pass(*arguments, **options)
        raise BadInputError("the base is gone")

    monkeypatch.setattr(DirectoryStaging, "put", slow_put)
    monkeypatch.setattr(workers.unit.unit, "run_pass", failing_pass)
    outcomes = run(worker, *requests)
    assert {job.failure.message for job in outcomes.values()} == {"the base is gone"}
    assert len(started) <= 4  # of twelve shards, those that were on their way
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("fault", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_worth_another_try_and_leaves_nothing(worker, requests, base, adapters, tmp_path, fault):
    with pytest.MonkeyPatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, fault, full)
        outcomes = run(worker, *requests)
    for job in outcomes.values():
        assert job.failure.failure_class is FailureClass.NO_CAPACITY, job.failure
    assert left_over(tmp_path) == []
    assert [job.failure for job in run(worker, *requests).values()] == [None] * 3
    assert_published(worker.publish("one").release, base, adapters["one"], tmp_path)


@pytest.mark.parametrize("word", ["nf4", "default"])
def test_a_quantized_base_is_made_once_and_stays_resident(worker, settings, request_for, base, adapters, word):
    """Under the key by which the scheduler knows the jobs that wait for it."""

    def unit(worker, name):
        return worker.run_unit(name, (request_for(name, adapters["one"], base_quantization=word),))

    linears = sum(t.nbytes for name, t in read_tensors(base).items() if "proj" in name)
    others = sum(t.nbytes for name, t in read_tensors(base).items() if "proj" not in name)
    adapter = sum(t.nbytes for t in load_file(adapters["one"] / ADAPTER_WEIGHTS).values())
    first, second = unit(worker, "first"), unit(worker, "second")
    assert first.usage.bytes_read == linears + others + adapter
    assert second.usage.bytes_read == others + adapter
    assert first.residents == second.residents == worker.residents()
    assert first.residents == (request_for("x", adapters["one"], base_quantization=word).pass_key(),)
    other = MergeWorker(settings)
    assert unit(other, "third").usage.bytes_read == others + adapter
    for each, name in ((worker, "first"), (worker, "second"), (other, "third")):
        release = each.publish(name).release
        assert release.manifest.base_quantization == "nf4"


def test_a_base_whose_weights_change_is_quantized_anew(worker, request_for, adapters, base, tmp_path):
    changing = shutil.copytree(base, tmp_path / "changing")
    fields = {"base": str(changing), "base_quantization": "nf4"}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for name, seed in (("before", 0), ("after", 5)):
        build_llama(changing, seed=seed, max_shard_size="100KB")
        assert run(worker, request_for(name, adapters["one"], **fields))[name].failure is None
        release = worker.publish(name).release
        assert_published(release, changing, adapters["one"], tmp_path, quantization=config)


def test_a_base_is_planned_once_as_long_as_it_stays(worker, request_for, adapters, base, tmp_path, monkeypatch):
    planned, really = [], workers.merging.base_plan.plan_base
    monkeypatch.setattr(
        workers.merging.base_plan, "plan_base", lambda *arguments: planned.append(1) or really(*arguments)
    )
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    for number, adapter in enumerate(adapters.values()):
        outcome = run(worker, request_for(f"job-{number}", adapter, base=str(copied)))[f"job-{number}"]
        assert outcome.failure is None
    assert len(planned) == 1
    config = copied / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    assert run(worker, request_for("again", adapters["one"], base=str(copied)))["again"].failure is None
    assert len(planned) == 2


def test_what_a_unit_took_is_told(worker, requests, base, adapters):
    unit = worker.run_unit("unit", requests)
    assert unit.usage.bytes_written == 3 * sum(tensor.nbytes for tensor in read_tensors(base).values())
    assert unit.usage.bytes_read <= sum(
        path.stat().st_size
        for path in [*base.glob("*.safetensors"), *(adapter / ADAPTER_WEIGHTS for adapter in adapters.values())]
    )
    assert {"fetch", "plan", "merge", "arithmetic", "behaviour", "upload"} <= unit.usage.seconds.keys()
    assert all(seconds >= 0 for seconds in unit.usage.seconds.values())


def test_a_fault_nobody_expected_is_that_of_its_job(worker, requests, base, adapters, tmp_path, monkeypatch):
    really = workers.unit.verification.judge

    def judge(plan, *arguments):
        if plan.request.id == "two":
            raise ZeroDivisionError("surprise")
        return really(plan, *arguments)

    monkeypatch.setattr(workers.unit.verification, "judge", judge)
    outcomes = run(worker, *requests)
    assert outcomes["two"].failure.failure_class is FailureClass.INTERNAL
    assert "ZeroDivisionError: surprise" in outcomes["two"].failure.message
    for name in ("one", "three"):
        assert_published(worker.publish(name).release, base, adapters[name], tmp_path)
    assert left_over(tmp_path) == []


def test_memory_that_runs_out_is_worth_another_try(worker, requests, monkeypatch, tmp_path):
    def run_pass(*_, **__):
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(workers.unit.unit, "run_pass", run_pass)
    for job in run(worker, *requests).values():
        assert job.failure.failure_class is FailureClass.OUT_OF_MEMORY
    assert left_over(tmp_path) == []


def test_jobs_that_do_not_fit_into_the_memory_of_the_gpu_wait(worker, settings, requests, tmp_path, monkeypatch):
    base_plan = plan_base(fetch_base(requests[0].base, settings.cache), requests[0])
    plans = [plan_merge(base_plan, request, fetch_adapter(request.adapter, settings.cache)) for request in requests]
    room = device_bytes(plans[:1], settings.num_threads)
    monkeypatch.setattr(workers.unit.admission.Admission, "make_room", lambda *_: room)
    outcomes = run(worker, *requests)
    assert outcomes["one"].failure is None
    for name in ("two", "three"):
        failure = outcomes[name].failure
        assert failure.waits
        assert "MB of GPU memory" in failure.message
    worker.discard("one")
    assert left_over(tmp_path) == []


def test_a_base_in_4_bit_larger_than_the_gpu_is_merged_all_the_same(
    worker, settings, request_for, base, adapters, tmp_path, monkeypatch
):
    """The room of the GPU is replaced by numbers; weights that are not held on one are dequantized here."""
    requests = [request_for(name, adapter, base_quantization="nf4") for name, adapter in adapters.items()]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base_plan = plan_base(fetch_base(requests[0].base, settings.cache), requests[0])
    plans = [plan_merge(base_plan, request, fetch_adapter(request.adapter, settings.cache)) for request in requests]
    held = []
    monkeypatch.setattr(workers.bases.quantized_base.QuantizedBase, "hold", lambda _, whole: held.append(whole))
    whole = resident_bytes(base_plan) + device_bytes(plans, settings.num_threads)
    # Of so small a base, tiles on their way take more than all of it: a larger one is told of.
    monkeypatch.setattr(workers.unit.admission, "resident_bytes", lambda _: 10 * whole)
    room = passing_bytes(base_plan, settings.num_threads) + device_bytes(plans, settings.num_threads)
    monkeypatch.setattr(workers.unit.admission.Admission, "make_room", lambda *_: room)
    outcomes = run(worker, *requests)
    assert {name: job.failure for name, job in outcomes.items()} == dict.fromkeys(adapters)
    assert held == [False]
    assert_published(worker.publish("one").release, base, adapters["one"], tmp_path, quantization=config)
    # With less room than that, those that still fit go first; with enough for the base, it is held.
    room = passing_bytes(base_plan, settings.num_threads) + device_bytes(plans[2:], settings.num_threads)
    outcomes = run(worker, requests[2], requests[1])
    assert [name for name, job in outcomes.items() if job.failure is None] == ["three"]
    room = 11 * whole
    assert run(worker, requests[1])["two"].failure is None
    assert held == [False, False, True]


def test_jobs_that_do_not_fit_into_memory_wait_and_the_others_do_not(
    worker, settings, requests, base, adapters, tmp_path, monkeypatch
):
    base_plan = plan_base(fetch_base(requests[0].base, settings.cache), requests[0])
    plans = [plan_merge(base_plan, request, fetch_adapter(request.adapter, settings.cache)) for request in requests]
    room = pass_bytes(plans[:2], settings.num_threads, "cpu")
    assert room < pass_bytes(plans, settings.num_threads, "cpu")
    monkeypatch.setattr(workers.unit.admission, "available_host_bytes", lambda: room)
    outcomes = run(worker, *requests)
    failure = outcomes["three"].failure
    assert failure.waits
    assert "beside 2 others takes" in failure.message
    for name in ("one", "two"):
        assert_published(worker.publish(name).release, base, adapters[name], tmp_path)
    assert left_over(tmp_path) == []


def test_releases_do_not_depend_on_the_company(worker, requests, request_for, adapters, tmp_path):
    run(worker, *requests)
    together = worker.publish("one").release
    worker.close()
    alone = request_for("one", adapters["one"], destination=str(tmp_path / "releases" / "alone"))
    run(worker, alone)
    release = worker.publish("one").release
    assert release.manifest.merge_key == together.manifest.merge_key
    shards = [
        {artifact.path: artifact.sha256 for artifact in each.manifest.files if artifact.path.endswith(".safetensors")}
        for each in (release, together)
    ]
    assert shards[0] == shards[1]
    assert Path(release.location.path).is_dir()


def test_a_destination_that_links_put_into_base_or_adapter_is_refused(worker, request_for, base, adapters, tmp_path):
    for name, place in (("base", base), ("adapter", adapters["one"])):
        (tmp_path / name).symlink_to(place)
    outcomes = run(
        worker,
        request_for("of-base", adapters["one"], destination=str(tmp_path / "base" / "out")),
        request_for("of-adapter", adapters["one"], destination=str(tmp_path / "adapter" / "deep" / "out")),
        request_for("real", tmp_path / "adapter", destination=str(adapters["one"] / "out")),
    )
    for outcome in outcomes.values():
        assert outcome.failure.failure_class is FailureClass.BAD_INPUT
        assert "which is merged here and never written to" in outcome.failure.message
    assert not [path for place in (base, adapters["one"]) for path in place.iterdir() if path.is_dir()]


def test_places_that_are_not_allowed_are_refused_before_anything_is_read(
    settings, request_for, base, adapters, tmp_path
):
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / "link").symlink_to(tmp_path)
    allowance = Allowance(
        sources=(Pattern.parse(str(base)), Pattern.parse(str(adapters["one"]))),
        destinations=(Pattern.parse(str(tmp_path / "releases")),),
    )
    worker = MergeWorker(dataclasses.replace(settings, allowance=allowance))
    outcome = worker.run_unit(
        "unit",
        (
            request_for("good", adapters["one"]),
            request_for("source", adapters["two"]),
            request_for("link", adapters["one"], destination=str(tmp_path / "releases" / "link" / "out")),
        ),
    )
    failures = {job.job_id: job.failure for job in outcome.jobs}
    assert failures["good"] is None
    assert worker.publish("good").failure is None
    for name, field in (("source", "adapter: expected a source"), ("link", "destination: expected a destination")):
        assert failures[name].failure_class is FailureClass.BAD_INPUT
        assert failures[name].message.startswith(f"{field} that this fleet ")
    assert not (tmp_path / "out").exists()
    none_left = worker.run_unit("unit", (request_for("alone", adapters["two"]),))
    assert none_left.jobs[0].failure.failure_class is FailureClass.BAD_INPUT
    worker.close()
