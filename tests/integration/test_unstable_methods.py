"""An adapter that gives other weights on another machine, from request to release."""

import pytest

from jobs.request import BaseQuantization, MergeRequest
from tests.methods import make_method_adapter
from tests.models import build_llama
from workers.adapters.methods import REMADE, UNSTABLE


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False)


def outcomes_of(worker, base, adapters, tmp_path, **fields):
    requests = [
        MergeRequest(
            id=name,
            base=str(base),
            adapter=str(adapter),
            destination=str(tmp_path / "releases" / name),
            base_quantization="none",
            parity={"level": "arithmetic"},
            **fields,
        )
        for name, adapter in adapters.items()
    ]
    return {outcome.job_id: outcome for outcome in worker.run_unit("unit", tuple(requests)).jobs}


def test_it_is_merged_where_that_is_accepted_and_the_manifest_says_what_with(worker, llama, tmp_path):
    methods = [*UNSTABLE, "OSF", "LORA"]
    adapters = {name: make_method_adapter(llama, tmp_path / name, name) for name in methods}
    refused = outcomes_of(worker, llama, adapters, tmp_path)
    assert {name for name, outcome in refused.items() if outcome.failure} == set(UNSTABLE)
    for name in UNSTABLE:
        message = refused[name].failure.message
        assert name in message
        assert "number of threads" in message
        assert "accept_unstable: true" in message
    accepted = outcomes_of(worker, llama, adapters, tmp_path, accept_unstable=True)
    assert {name: outcome.failure for name, outcome in accepted.items()} == dict.fromkeys(methods)
    made_with = {name: worker.publish(name).release.manifest.made_with for name in methods}
    assert made_with.pop("LORA") is None
    for name, made in made_with.items():
        assert (made.method, made.stable, made.num_threads) == (name, name in REMADE, 1)
        assert made.processor
        assert made.blas


def test_accepting_is_no_part_of_requests_that_do_not(llama):
    fields = {"base": str(llama), "adapter": "/adapter", "destination": "/destination"}
    plain, denied, accepting = (
        MergeRequest(**fields, **more) for more in ({}, {"accept_unstable": False}, {"accept_unstable": True})
    )
    assert plain == denied
    assert plain.id == denied.id != accepting.id
    assert "accept_unstable" not in plain.model_dump_json()
    keys = {each.settled(BaseQuantization.NF4).merge_key("a", "b") for each in (plain, accepting)}
    assert len(keys) == 1
