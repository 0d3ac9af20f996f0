"""Experts: adapters of single ones, which were linears in training, and of all of a layer in one parameter."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from jobs.errors import BadInputError, UnsupportedError
from jobs.parity_report import TensorCheck
from tests import architectures
from tests.merges import different, merge, merge_by_peft, plan_pass, read_tensors
from tests.methods import make_method_adapter, save_old_adapter
from tests.models import load_plain
from workers.adapters.wearing import take_off, wrapped_modules
from workers.merging.checks.evidence import Evidence
from workers.parity.loading import Room, load_model

LINEARS = {
    "mixtral": ["q_proj", "w1", "w2", "w3", "gate"],
    "qwen2_moe": ["q_proj", "gate_proj", "up_proj", "down_proj"],
}
"""What an adapter of all linears targets; the second has shared experts, which are linears of the same names still."""

SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module", params=sorted(LINEARS))
def base(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / request.param
    return architectures.build("decoder", request.param, directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return architectures.build("decoder", "mixtral", tmp_path_factory.mktemp("base") / "mixtral", dtype=torch.float32)


def is_close(merged, exact):
    return torch.allclose(merged.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("alone", "fields"),
    [
        (False, {"use_rslora": True}),
        (
            False,
            {
                "alpha_pattern": {"ONE": 5},
                "rank_pattern": {"1.mlp.experts.0.down_proj": 2, "1.block_sparse_moe.experts.0.w2": 2},
            },
        ),
        (True, {}),
    ],
    ids=["rank-stabilized", "patterns", "one of two that become one"],
)
def test_single_experts_are_merged_as_they_were_trained(base, tmp_path, alone, fields):
    """Expected is W + scaling * B @ A for each expert, with the ranks and scalings of the configuration."""
    targets = LINEARS[base.name]
    fields = json.loads(json.dumps(fields).replace("ONE", targets[1]))
    fields |= {"target_modules": [targets[1]] if alone else targets}
    expected = save_old_adapter(base, tmp_path / "adapter", **fields)
    planned = plan_pass(base, {"job": tmp_path / "adapter"}, tmp_path, parity={"level": "arithmetic"})
    assert not planned.run().errors
    merged = read_tensors(planned.output("job"))
    assert len(expected) >= 8
    before = read_tensors(base)
    wrong = [name for name in merged if not is_close(merged[name], expected.get(name, before[name].double()))]
    assert wrong == []
    checks = planned.check()["job"]
    assert {name for name, check in checks.items() if check.targeted} == expected.keys()
    assert not any(check.num_bad_elements for check in checks.values())


def test_what_is_asked_computes_with_single_experts(base, tmp_path):
    """The reference of behaviour, as it is, without the adapter and merged: held against a base with these weights."""
    expected = save_old_adapter(base, tmp_path / "adapter", target_modules=LINEARS[base.name], use_rslora=True)
    opened = plan_pass(base, {"job": tmp_path / "adapter"}, tmp_path).plans[0].opened
    by_hand = tmp_path / "by-hand"
    load_plain(base).save_pretrained(by_hand)
    weights = {name: expected.get(name, weight).float() for name, weight in read_tensors(base).items()}
    save_file(weights, by_hand / "model.safetensors", metadata={"format": "pt"})

    def logits(model):
        with torch.no_grad():
            return model(torch.arange(8)[None]).logits

    before, after = logits(load_plain(base)), logits(load_plain(by_hand))
    assert float((after - before).abs().max()) > 0.1
    running = load_model(base, Room(device=torch.device("cpu"), scratch=tmp_path))
    with running.with_adapter(opened) as worn:
        peft_model = worn.model
        assert torch.allclose(logits(peft_model), after, atol=1e-4)
        with peft_model.disable_adapter():
            assert torch.equal(logits(peft_model), before)
        for name, _ in wrapped_modules(peft_model):
            take_off(opened, peft_model, name, merge=True)
        assert torch.allclose(logits(peft_model), after, atol=1e-4)


@pytest.mark.parametrize(("model_type", "fields"), [("axk2", {}), ("qwen2_moe", {"bias": "all"})])
def test_linears_named_as_experts_that_were_one_parameter_in_training(tmp_path, model_type, fields):
    """Shared experts and biases, trained where PEFT knows no single expert: expected is what PEFT merges."""
    base = architectures.build("decoder", model_type, tmp_path / "base")
    fields |= {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    adapter = make_method_adapter(base, tmp_path / "adapter", "LORA", task_type=None, **fields)
    assert different(merge(base, adapter, tmp_path), merge_by_peft(base, adapter, tmp_path / "peft")) == []


def test_an_expert_without_its_tensors_is_missing(mixtral, tmp_path):
    left_out = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    save_old_adapter(mixtral, tmp_path / "adapter", target_modules=["w1", "w2"], left_out=[left_out])
    with pytest.raises(BadInputError, match=r"expected tensor \S+layers\.1\S+experts\.2\.w1\.lora_A\.weight "):
        plan_pass(mixtral, {"job": tmp_path / "adapter"}, tmp_path)


def test_a_rank_that_is_not_the_configurations(mixtral, tmp_path):
    save_old_adapter(mixtral, tmp_path / "adapter", target_modules=["w1"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(BadInputError, match=r"experts\.0\.w1\.lora_A\.weight: expected shape \[8, 64\].* \[4, 64\]"):
        plan_pass(mixtral, {"job": tmp_path / "adapter"}, tmp_path)


def test_single_experts_that_are_not_plain_lora_are_refused_by_their_own_cause(mixtral, tmp_path):
    save_old_adapter(mixtral, tmp_path / "adapter", target_modules=["w1", "w2", "w3"], use_dora=True)
    with pytest.raises(UnsupportedError, match=r"experts\.0\.w1\.lora_A\.weight: .* single expert.* has use_dora$"):
        plan_pass(mixtral, {"job": tmp_path / "adapter"}, tmp_path)


def test_single_experts_on_a_base_that_holds_them_together_are_refused_by_their_own_cause(mixtral, tmp_path):
    """PEFT would convert them, and scale rsLoRA by sqrt(2) too much."""
    save_old_adapter(mixtral, tmp_path / "adapter", target_modules=["w1", "w2", "w3"], use_rslora=True)
    together = tmp_path / "together"
    load_plain(mixtral).save_pretrained(together, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(together / "model.safetensors"))
    with pytest.raises(UnsupportedError, match=r"of a single expert.* the base's files hold the experts together$"):
        plan_pass(together, {"job": tmp_path / "adapter"}, tmp_path)


def test_experts_that_were_trained_together(mixtral, tmp_path):
    """Expected is W + scaling * B @ A in float64, expert by expert: PEFT holds ranks first in A, experts first in B."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = make_method_adapter(mixtral, tmp_path / "adapter", "LORA", std=0.1, **fields)
    tensors = load_file(adapter / "adapter_model.safetensors")
    before, merged = read_tensors(mixtral), merge(mixtral, adapter, tmp_path)
    for layer in range(2):
        halves = [tensors[f"base_model.model.model.layers.{layer}.mlp.experts.lora_{half}.weight"] for half in "AB"]
        for expert in range(4):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"
            a_RI, b_OR = halves[0].double()[expert * 4 : expert * 4 + 4], halves[1].double()[:, expert::4]
            exact = before[name].double() + 2 * b_OR @ a_RI
            assert not torch.equal(merged[name], before[name])
            assert is_close(merged[name], exact)


@pytest.mark.parametrize(
    ("saved_by", "parameter", "turned"),
    [
        ("0.18.1", "gate_up_proj", False),
        ("0.19.0", "gate_up_proj", False),
        (None, "gate_up_proj", False),
        ("0.18.1", "down_proj", True),
        ("0.21.2", "down_proj", True),
    ],
)
def test_parameters_that_an_older_peft_read_the_other_way_round_are_refused(tmp_path, saved_by, parameter, turned):
    """PEFT turned inputs and outputs of three-dimensional parameters with 0.19.1; in a square one no shape tells it."""
    config = MixtralConfig(**SMALL, intermediate_size=32, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")  # gate_up_proj is [4, 64, 64]
    fields = {"r": 4, "target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{parameter}"]}
    adapter = make_method_adapter(tmp_path / "base", tmp_path / "adapter", "LORA", **fields)
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert not plan_pass(tmp_path / "base", {"job": adapter}, tmp_path).run().errors  # saved by this version
    written["peft_version"] = saved_by
    (adapter / "adapter_config.json").write_text(json.dumps({key: value for key, value in written.items() if value}))
    if turned:
        tensors = load_file(adapter / "adapter_model.safetensors")
        for name in [name for name in tensors if "experts.lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            tensors[name], tensors[other] = tensors[other].T.contiguous(), tensors[name].T.contiguous()
        save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=r"experts\.lora_A\.weight .*saved by .*the other way round"):
        plan_pass(tmp_path / "base", {"job": adapter}, tmp_path / "again")


def test_no_expert_is_proven_by_a_neighbour(mixtral, tmp_path):
    """Not by an attention weight of the same layer, and not by what PEFT holds under no name of the file."""
    save_old_adapter(mixtral, tmp_path / "single", target_modules=["q_proj", "w1"])
    fields = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    make_method_adapter(mixtral, tmp_path / "together", "LORA", **fields)
    single, together = (
        Evidence(plan) for plan in plan_pass(mixtral, {n: tmp_path / n for n in ("single", "together")}, tmp_path).plans
    )
    attention = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    checks = {name: TensorCheck.model_construct(tensor=name, targeted=True) for name in attention}
    for evidence, num_tensors in ((single, 16), (together, 4)):
        unfounded = evidence.unfounded(checks)
        assert len(unfounded) == num_tensors
        assert all(".experts." in name for name in unfounded)
    assert together.misread({}) == tuple(name for name in together.tensors if ".experts." in name)
