"""Adapters beyond LoRA on linear layers, from request to release, with both kinds of parity."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.request import MergeRequest
from tests.methods import make_method_adapter
from tests.models import build_llama, build_qwen2, make_adapter
from workers.parity.inference import quiet_libraries

PARITY = {"prompts": ["The capital of France is"], "max_new_tokens": 3, "min_positions": 1}
# Of each kind of method one: `make fidelity` compares all of them with PEFT, bit by bit.
METHODS = [
    "BOFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "ROAD",
    "SHIRA",
    "TRAINABLE_TOKENS",
    "VERA",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama")


def outcomes_of(worker, base, adapters, tmp_path, **fields):
    requests = [
        MergeRequest(
            id=name,
            base=str(base),
            adapter=str(adapter),
            destination=str(tmp_path / "releases" / name),
            parity=PARITY,
            **fields,
        )
        for name, adapter in adapters.items()
    ]
    return {outcome.job_id: outcome for outcome in worker.run_unit("unit", tuple(requests)).jobs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "methods"),
    [("none", METHODS), ("nf4", ["BOFT", "IA3", "LOHA", "LORA", "VERA"])],
)
def test_methods_behave_as_base_and_adapter_do(worker, llama, tmp_path, quantization, methods):
    adapters = {name: make_method_adapter(llama, tmp_path / name, name, std=0.05) for name in methods}
    outcomes = outcomes_of(worker, llama, adapters, tmp_path, base_quantization=quantization)
    assert {name: outcome.failure for name, outcome in outcomes.items()} == dict.fromkeys(methods)
    assert max(outcome.parity.mean_kl for outcome in outcomes.values()) < 1e-3
    assert {outcome.parity.top1_agreement for outcome in outcomes.values()} == {1.0}
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))


@pytest.mark.parametrize("trained", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_tied_embeddings_that_come_apart_load_as_such(worker, tmp_path, trained, quantization):
    base = build_qwen2(tmp_path / "qwen2")
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=trained, trained=True)
    outcomes = outcomes_of(worker, base, {"job": adapter}, tmp_path, base_quantization=quantization)
    assert outcomes["job"].failure is None
    directory = worker.publish("job").release.location.path
    with quiet_libraries():
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
