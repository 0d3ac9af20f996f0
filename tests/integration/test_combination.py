"""Several adapters in one model, from request to release, with both kinds of parity."""

import json

import pytest
from transformers import BitsAndBytesConfig

from jobs.errors import FailureClass
from jobs.parity_report import ParityReport
from jobs.release import Manifest
from jobs.request import MergeRequest
from tests.combinations import merge_combined_by_peft
from tests.merges import different, merge_by_peft, read_tensors
from tests.models import build_llama, make_adapter

PARITY = {"prompts": ["The capital of France is"], "max_new_tokens": 3, "min_positions": 1}
WEIGHTS = (0.75, -0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base):
    places = tmp_path_factory.mktemp("adapters")
    return make_adapter(base, places / "one"), make_adapter(base, places / "two", targets=["q_proj", "up_proj"], seed=2)


@pytest.fixture
def request_for(base, adapters, tmp_path):
    def make(job_id, how, **fields):
        several = [{"adapter": str(each), "weight": weight} for each, weight in zip(adapters, WEIGHTS, strict=True)]
        defaults = {
            "base": str(base),
            "adapters": several,
            "combination": how,
            "destination": str(tmp_path / "releases" / job_id),
            "base_quantization": "none",
            "parity": PARITY,
        }
        return MergeRequest(id=job_id, **defaults | fields)

    return make


def test_combined_adapters_become_a_release(worker, request_for, base, adapters, tmp_path):
    how = {"type": "dare_ties", "density": 0.5, "seed": 5}
    broken = {"adapters": [{"adapter": str(adapters[0])}, {"adapter": str(tmp_path / "nowhere")}]}
    requests = (
        request_for("combined", how),
        request_for("broken", {"type": "cat"}, **broken),
        MergeRequest(
            id="single",
            base=str(base),
            adapter=str(adapters[0]),
            destination=str(tmp_path / "releases" / "single"),
            base_quantization="none",
            parity=PARITY,
        ),
    )
    outcomes = {outcome.job_id: outcome for outcome in worker.run_unit("unit", requests).jobs}
    assert outcomes["combined"].failure is None
    assert outcomes["broken"].failure.failure_class is FailureClass.NOT_FOUND
    assert outcomes["single"].failure is None
    assert outcomes["combined"].parity.mean_kl < 1e-3
    release = worker.publish("combined").release
    directory = release.location.path
    arguments = {"combination_type": "dare_ties", "density": 0.5, "seed": 5}
    expected = merge_combined_by_peft(base, adapters, WEIGHTS, tmp_path / "peft", **arguments)
    assert different(read_tensors(directory), expected) == []

    manifest = Manifest.model_validate_json((directory / "manifest.json").read_bytes())
    assert manifest.adapter is None
    assert [str(each.adapter) for each in manifest.adapters] == [str(adapter) for adapter in adapters]
    assert tuple(each.weight for each in manifest.adapters) == WEIGHTS
    assert manifest.combination == requests[0].combination
    report = ParityReport.model_validate_json((directory / "parity.json").read_bytes())
    assert (report.adapter, report.adapters) == (None, manifest.adapters)
    page = (directory / "parity.html").read_text()
    card = (directory / "README.md").read_text()
    for adapter in adapters:
        assert str(adapter) in card
        assert str(adapter) in page
    assert "one-two merged into llama" in card
    assert "weight -0.5" in card
    assert "combined by PEFT: dare_ties, density 0.5, majority_sign_method total, seed 5" in card
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))

    single = json.loads((worker.publish("single").release.location.path / "manifest.json").read_text())
    assert single["adapter"] == str(adapters[0])
    assert not {"adapters", "combination"} & single.keys()


def test_the_same_request_is_the_same_release(worker, request_for):
    how = {"type": "dare_linear", "density": 0.5}
    worker.run_unit("unit", (request_for("job", how),))
    first = worker.publish("job").release
    (again,) = worker.run_unit("unit", (request_for("job", {**how, "seed": 0}),)).jobs
    assert (again.release.created, again.merge_key) == (False, first.manifest.merge_key)
    (other,) = worker.run_unit("unit", (request_for("job", {**how, "seed": 1}),)).jobs
    assert other.failure.failure_class is FailureClass.BAD_INPUT
    assert "choose another destination" in other.failure.message


def test_combined_adapters_go_into_4_bit_weights(worker, request_for, base, tmp_path):
    (outcome,) = worker.run_unit("unit", (request_for("job", {"type": "svd"}, base_quantization="nf4"),)).jobs
    assert outcome.failure is None
    directory = worker.publish("job").release.location.path
    (combined,) = [path.parent for path in (tmp_path / "cache" / "combined").rglob("adapter_config.json")]
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    expected = merge_by_peft(base, combined, tmp_path / "peft", quantization=quantization)
    assert different(read_tensors(directory), expected) == []
