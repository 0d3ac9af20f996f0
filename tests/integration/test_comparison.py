"""`compare` of a request: both merges beside both references, against what PEFT's own merges give."""

import json

import pytest
import torch
from transformers import BitsAndBytesConfig

import workers.parity.comparison
import workers.unit.verification
from jobs.errors import FailureClass, NoCapacityError, ParityFailedError
from jobs.parity_report import ParityReport
from jobs.request import BaseQuantization, MergeRequest
from tests.merges import load_dequantized
from tests.methods import make_method_adapter
from tests.models import build_bnb_4bit, build_llama, load_plain, make_adapter, merge_with_peft
from workers.adapters.adapter import open_adapter
from workers.parity.asking import Subject
from workers.parity.behaviour import check_behaviour

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
PARITY = {
    "min_positions": 1,
    "prompts": ["The capital of France is"],
    "max_new_tokens": 2,
    "texts": ["Bees make honey.", {"prompt": "How many days has a week? ", "completion": "It has seven."}],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def base(places):
    return build_llama(places / "llama")


@pytest.fixture(scope="module")
def adapter(places, base):
    return make_adapter(base, places / "adapter")


def request(base, adapter, tmp_path, **fields):
    places = {"base": str(base), "adapter": str(adapter), "destination": str(tmp_path / "releases" / "job")}
    return MergeRequest(**places | {"id": "job", "parity": PARITY, "compare": True} | fields)


def report_of(worker, asked):
    [outcome] = worker.run_unit("unit", (asked,)).jobs
    assert outcome.failure is None
    assert worker.publish("job").release.created
    return ParityReport.model_validate_json((outcome.report_path / "parity.json").read_bytes())


@pytest.mark.parametrize(("asked", "other"), [("nf4", "none"), ("none", "nf4"), ("fp4", "none")])
def test_the_alternative_is_the_merge_of_peft_into_the_other_weights(
    worker, base, adapter, places, tmp_path, asked, other
):
    report = report_of(worker, request(base, adapter, tmp_path, base_quantization=asked))
    assert report.alternative.base_quantization is BaseQuantization(other)
    directory = places / f"merged-{other}"
    if not directory.exists():
        merge_with_peft(base, adapter, directory, quant_type=None if other == "none" else other)
    (tmp_path / "room").mkdir()
    subject = Subject(
        request=request(base, adapter, tmp_path, base_quantization=other),
        merged=directory,
        adapter=open_adapter(adapter),
        streamed=True,
    )
    # The figures of one machine for the same bits are the same figures.
    found = check_behaviour(base, [subject], torch.device("cpu"), tmp_path / "room", cancelled=lambda: None)["job"]
    assert report.alternative.behaviour[0] == found[0]
    if asked != "fp4":  # without a release in another type, a merge into the own weights is asked beside nf4
        assert report.alternative.behaviour == found
    references = sorted(check.reference for check in report.behaviour)
    assert [(way.check.reference, way.published) for way in report.ways] == [
        (reference, published) for reference in references for published in (True, False)
    ]
    # Each merge is nearer to its own reference than to the other one, or this says nothing.
    own, foreign = report.alternative.behaviour
    assert own.held_out.mean_kl < foreign.held_out.mean_kl
    assert own.held_out.num_texts == len(PARITY["texts"])


def test_nothing_of_the_alternative_is_left_or_published(worker, base, adapter, tmp_path):
    report_of(worker, request(base, adapter, tmp_path))
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []
    released = json.loads((tmp_path / "releases" / "job" / "parity.json").read_text())
    assert released["alternative"]["base_quantization"] == "none"
    page = (tmp_path / "releases" / "job" / "parity.html").read_text()
    assert "Which base to merge into" in page


def test_the_report_sets_what_4_bits_changed_beside_the_delta(worker, base, adapter, tmp_path):
    report = report_of(worker, request(base, adapter, tmp_path, compare=False))
    changed = {check.tensor: check for check in report.tensors if check.changed}
    weights, through_4bit = load_plain(base).state_dict(), load_dequantized(base, NF4).state_dict()
    for name, check in changed.items():
        error = float((through_4bit[name].double() - weights[name].double()).norm())
        assert check.quantization_error == pytest.approx(error, rel=1e-5)
    assert all(check.quantization_error is None for check in report.tensors if "norm" in check.tensor)
    assert "Quantization error over delta" in (tmp_path / "releases" / "job" / "parity.html").read_text()


def test_what_peft_merges_is_compared_too(worker, base, places, tmp_path):
    adapter = make_method_adapter(base, places / "dora", "LORA", use_dora=True)
    report = report_of(worker, request(base, adapter, tmp_path))
    own, foreign = report.alternative.behaviour
    assert own.gates
    assert own.held_out.mean_kl < foreign.held_out.mean_kl


def test_a_base_without_other_weights_is_refused(worker, base, adapter, places, tmp_path):
    stored = build_bnb_4bit(base, places / "stored")
    [outcome] = worker.run_unit("unit", (request(stored, adapter, tmp_path),)).jobs
    assert outcome.failure.failure_class is FailureClass.BAD_INPUT
    assert "no other weights to compare with" in outcome.failure.message


def test_what_goes_wrong_in_a_comparison_is_the_failure_of_those_that_compare(
    worker, base, adapter, tmp_path, monkeypatch
):
    def full(*_arguments, **_options):
        raise NoCapacityError("the disk is full")

    monkeypatch.setattr(workers.unit.verification, "compare_ways", full)
    plain = request(base, adapter, tmp_path, id="plain", compare=False, destination=str(tmp_path / "releases" / "two"))
    compared, other = worker.run_unit("unit", (request(base, adapter, tmp_path), plain)).jobs
    assert compared.failure.failure_class is FailureClass.NO_CAPACITY
    assert ParityReport.model_validate_json((compared.report_path / "parity.json").read_bytes()).passed
    assert other.failure is None
    assert worker.publish("plain").release.created


def test_an_alternative_that_does_not_run_is_no_parity_failure(worker, base, adapter, tmp_path, monkeypatch):
    def not_finite(_base, subjects, *_arguments, **_options):
        return {subject.request.id: ParityFailedError("expected finite logits") for subject in subjects}

    monkeypatch.setattr(workers.parity.comparison, "check_behaviour", not_finite)
    [outcome] = worker.run_unit("unit", (request(base, adapter, tmp_path),)).jobs
    assert outcome.failure.failure_class is FailureClass.BAD_INPUT
    assert "leave out compare" in outcome.failure.message
    assert list((tmp_path / "scratch").glob("compared-*")) == []


def test_jobs_of_a_pass_that_do_not_compare_are_not_compared(worker, base, adapter, tmp_path):
    plain = request(base, adapter, tmp_path, id="plain", compare=False, destination=str(tmp_path / "releases" / "two"))
    outcomes = worker.run_unit("unit", (request(base, adapter, tmp_path), plain)).jobs
    reports = [
        ParityReport.model_validate_json((outcome.report_path / "parity.json").read_bytes()) for outcome in outcomes
    ]
    assert [report.alternative is not None for report in reports] == [True, False]
    assert reports[0].behaviour == reports[1].behaviour
