"""What is streamed is what PEFT says: which weights, with which rank and scaling; the rest is left to PEFT."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from jobs.errors import BadInputError, UnsupportedError
from tests.models import build_llama, build_qwen2, load_plain, make_adapter
from workers.adapters.adapter import ADAPTER_WEIGHTS, open_adapter
from workers.adapters.config import ADAPTER_CONFIG
from workers.adapters.coverage import cover
from workers.adapters.plain_lora import plan_lora
from workers.bases.model import quiet_transformers, skeleton

# PEFT tells whoever trains the head that it keeps a copy of it.
head_is_kept = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")

KINDS = {
    "all linears": {},
    "q and v": {"targets": ["q_proj", "v_proj"]},
    "a pattern": {"targets": r".*\.layers\.1\.(mlp|self_attn)\.(up_proj|k_proj)"},
    "every linear layer": {"targets": "all-linear"},
    "rank-stabilized": {"rslora": True, "rank": 5, "alpha": 7},
    "ranks and alphas by pattern": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 11, "^model.layers.0.self_attn.v_proj": 2},
        "alpha_pattern": {"down_proj": 1.5, r"layers\.0\..*k_proj": 64},
    },
    "patterns and rank-stabilized": {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 3}, "rslora": True},
    "alpha of zero": {"alpha": 0},
    "negative alpha": {"alpha": -4},
}


def plan(base, adapter):
    opened = open_adapter(adapter)
    return plan_lora(opened, cover(opened, skeleton(base)))


def test_a_delta_on_a_module_that_the_model_does_not_call_is_refused(tmp_path):
    # A Mamba multiplies by the weight of dt_proj itself; unmerged, an adapter on it has no effect.
    MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", targets=["dt_proj", "x_proj"])
    with torch.no_grad():
        model = PeftModel.from_pretrained(load_plain(tmp_path / "base"), adapter).get_base_model()
        mixer = model.backbone.layers[0].mixer
        mixer.x_proj.lora_B.default.weight.zero_()
        ids = torch.arange(9)[None]
        with_adapter = model(ids).logits
        mixer.dt_proj.lora_B.default.weight.zero_()
        assert torch.equal(model(ids).logits, with_adapter)
    with pytest.raises(UnsupportedError, match=r"weight of backbone\.layers\.0\.mixer\.dt_proj by itself"):
        plan(tmp_path / "base", adapter)
    # Training there leaves it as it began.
    change_tensors(
        adapter, lambda tensors: tensors["base_model.model.backbone.layers.0.mixer.dt_proj.lora_B.weight"].zero_()
    )
    assert {delta.weight.split(".")[-2] for delta in plan(tmp_path / "base", adapter)} == {"dt_proj", "x_proj"}


def change_config(adapter, **fields):
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(adapter, change):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)


def layers_of_peft(base, adapter):
    """Return rank and scaling of every layer that PEFT gives the whole model, by weight."""
    with quiet_transformers(), warnings.catch_warnings():
        # What PEFT only warns of, such as an exclusion that excludes nothing, it does all the same.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_plain(base), adapter).base_model.model
    return {
        f"{name}.weight": (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_weights_ranks_and_scalings_are_those_of_peft(base, tmp_path, kind):
    adapter = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    deltas = plan(base, adapter)
    expected = layers_of_peft(base, adapter)
    assert {delta.weight: (delta.rank, delta.scaling) for delta in deltas} == expected
    assert len(expected) > 1


def test_every_tensor_of_the_adapter_is_used_once(base, plain_adapter):
    used = [spec.name for delta in plan(base, plain_adapter) for spec in (delta.a_RI, delta.b_OR)]
    assert sorted(used) == sorted(load_file(plain_adapter / ADAPTER_WEIGHTS))


def test_biases_and_tied_embeddings_of_the_base_are_left_alone(tmp_path):
    base = build_qwen2(tmp_path / "qwen2", tokenizer=False)
    adapter = make_adapter(base, tmp_path / "adapter")
    assert {delta.weight for delta in plan(base, adapter)} == set(layers_of_peft(base, adapter))


def test_some_layers_only(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    change_tensors(adapter, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.0." in name])
    change_config(adapter, layers_to_transform=[1])
    assert [delta.weight for delta in plan(base, adapter)] == ["model.layers.1.self_attn.q_proj.weight"]


def test_modules_left_out(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    change_config(adapter, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    assert len(plan(base, adapter)) == 2


@head_is_kept
def test_a_head_that_was_saved_with_its_delta_is_left_to_peft(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", targets=["lm_head"])
    # PEFT keeps a copy of the base's head beside its delta, which replaces the base's.
    assert plan(base, adapter) == ()
    change_tensors(adapter, lambda tensors: tensors.pop("base_model.model.lm_head.base_layer.weight"))
    assert [delta.weight for delta in plan(base, adapter)] == ["lm_head.weight"]


@head_is_kept
def test_a_head_tied_to_the_embeddings_is_left_to_peft(tmp_path):
    tied = build_llama(tmp_path / "tied", tie_word_embeddings=True, tokenizer=False)
    adapter = make_adapter(tied, tmp_path / "adapter", targets=["lm_head", "q_proj"])
    assert {delta.weight.split(".")[-2] for delta in plan(tied, adapter)} == {"q_proj"}


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}])
def test_what_goes_beyond_plain_lora_is_left_to_peft(tmp_path, fields):
    base = build_qwen2(tmp_path / "qwen2", tokenizer=False)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], **fields)
    assert plan(base, adapter) == ()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_scaling_that_is_no_number_is_refused(base, adapter, alpha):
    change_config(adapter, lora_alpha=alpha)
    with pytest.raises(BadInputError, match=ADAPTER_CONFIG):
        plan(base, adapter)
