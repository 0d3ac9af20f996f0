"""A few rounds of `make wrong-merges`: what is wrong on its way from the adapter to the release is found and named."""

import dataclasses
import random

import pytest

from jobs.errors import FailureClass
from jobs.request import MergeRequest
from tests import architectures
from tests.methods import make_method_adapter
from tests.models import build_llama, build_qwen2
from tests.wrong_merges import WITH_EXPERTS, in_the_plan, merge_once, run_round


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    return {
        "a llama": build_llama(directory / "llama", tokenizer=False),
        "a tied qwen2": build_qwen2(directory / "qwen2", tokenizer=False),
        WITH_EXPERTS: architectures.build("decoder", "mixtral", directory / "mixtral"),
    }


@pytest.mark.parametrize("seed", range(8))
def test_what_is_broken_is_found_and_named(bases, tmp_path, seed):
    assert run_round(tmp_path, bases, random.Random(seed))[1] == ""


@pytest.mark.parametrize("method", ["IA3", "VERA"])
def test_a_forgotten_weight_that_peft_wants_to_look_at_is_found_and_named(bases, tmp_path, method):
    """In 4 bits nothing of the base can be mapped for PEFT; these methods look at weights when they are put on."""
    adapter = make_method_adapter(bases["a llama"], tmp_path / "adapter", method, std=0.1)
    request = MergeRequest(
        base=str(bases["a llama"]),
        adapter=str(adapter),
        destination=str(tmp_path / "release"),
        parity={"level": "arithmetic"},
    )
    forgotten = "model.layers.0.self_attn.v_proj.weight"

    def forget(plan):
        assert forgotten in plan.by_peft
        return dataclasses.replace(plan, by_peft={n: each for n, each in plan.by_peft.items() if n != forgotten})

    with in_the_plan(forget):
        outcome = merge_once(request, tmp_path / "worker")[0]
    assert outcome.failure.failure_class is FailureClass.PARITY_FAILED
    assert "model.layers.0.self_attn.v_proj" in outcome.failure.message
