"""What an adapter changes is what PEFT says; what it asks for beyond plain LoRA is refused by name."""

import dataclasses
import json
import shutil
import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from jobs.errors import BadInputError, MergefleetError, NotFoundError, UnsupportedError
from tests.models import build_llama, build_qwen2, load_plain, make_adapter
from workers.checkpoint import read_checkpoint
from workers.lanes.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, plan_lora
from workers.model import quiet_transformers, skeleton

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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False)


@pytest.fixture(scope="module")
def plain_adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "plain")


@pytest.fixture
def adapter(plain_adapter, tmp_path):
    """A copy of an adapter, to be damaged."""
    return shutil.copytree(plain_adapter, tmp_path / "adapter")


def plan(base, adapter):
    shapes = {name: spec.shape for name, (_, spec) in read_checkpoint(base).tensors.items()}
    return plan_lora(adapter, skeleton(base), shapes)


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
def test_a_separate_head_can_be_a_target(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", targets=["lm_head"])
    # PEFT keeps a copy of the base's head beside its delta.
    with pytest.raises(UnsupportedError, match=r"1 tensors .* first base_model\.model\.lm_head\.base_layer\.weight"):
        plan(base, adapter)
    change_tensors(adapter, lambda tensors: tensors.pop("base_model.model.lm_head.base_layer.weight"))
    assert [delta.weight for delta in plan(base, adapter)] == ["lm_head.weight"]


@head_is_kept
@pytest.mark.parametrize("stored_twice", [False, True])
def test_a_head_tied_to_the_embeddings_is_no_target(base, tmp_path, stored_twice):
    adapter = make_adapter(base, tmp_path / "adapter", targets=["lm_head"])
    tied = build_llama(tmp_path / "tied", tie_word_embeddings=True, tokenizer=False)
    if stored_twice:
        tensors = load_file(tied / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"changes lm_head\.weight, which the base ties to another tensor"):
        plan(tied, adapter)


def test_an_adapter_for_a_base_of_another_width_is_refused(base, tmp_path):
    wide = build_llama(tmp_path / "wide", hidden_size=128, tokenizer=False)
    adapter = make_adapter(wide, tmp_path / "adapter")
    with pytest.raises(BadInputError) as error:
        plan(base, adapter)
    message = str(error.value)
    assert "q_proj.lora_A.weight: expected shape [8, 64]" in message
    assert "found [8, 128]" in message
    assert "trained on another base" in message


def test_an_adapter_for_a_deeper_base_is_refused(base, tmp_path):
    deep = build_llama(tmp_path / "deep", num_hidden_layers=3, tokenizer=False)
    adapter = make_adapter(deep, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"14 tensors belong to nothing .*model\.layers\.2\."):
        plan(base, adapter)


def test_an_adapter_for_a_shallower_base_is_refused(base, tmp_path):
    shallow = build_llama(tmp_path / "shallow", num_hidden_layers=1, tokenizer=False)
    adapter = make_adapter(shallow, tmp_path / "adapter")
    with pytest.raises(BadInputError, match=r"expected tensor .*layers\.1\..*found none; the file holds 14 tensors"):
        plan(base, adapter)


def test_an_adapter_that_matches_nothing_is_refused(base, adapter):
    change_config(adapter, target_modules=["query_key_value"])
    with pytest.raises(BadInputError, match=r"does not fit this base, LlamaForCausalLM: .* not found"):
        plan(base, adapter)


def test_keys_without_the_prefix_of_peft_are_refused(base, adapter):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    change_tensors(adapter, rename)
    with pytest.raises(BadInputError, match=r"expected tensor base_model\.model\..* such as model\.layers"):
        plan(base, adapter)


NAME = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_delta_is_refused(base, adapter, half):
    change_tensors(adapter, lambda tensors: tensors.pop(f"{NAME}.{half}.weight"))
    with pytest.raises(BadInputError, match=f"expected tensor {NAME}.{half}.weight .* incomplete"):
        plan(base, adapter)


@pytest.mark.parametrize(
    "extra",
    [
        f"{NAME}.lora_magnitude_vector",
        f"{NAME}.lora_B.bias",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
        "anything",
    ],
)
def test_tensors_nobody_asked_for_are_refused(base, adapter, extra):
    change_tensors(adapter, lambda tensors: tensors.update({extra: torch.zeros(3)}))
    with pytest.raises(UnsupportedError, match=f"1 tensors belong to nothing .* first {extra}"):
        plan(base, adapter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_numbers_of_another_kind_are_refused(base, adapter, dtype):
    name = f"{NAME}.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UnsupportedError, match=f"tensor {name}: dtype {dtype}"):
        plan(base, adapter)


def test_a_transposed_tensor_is_refused(base, adapter):
    name = f"{NAME}.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors.update({name: tensors[name].t().contiguous()}))
    with pytest.raises(BadInputError, match=rf"tensor {name}: expected shape \[8, 64\] .* found \[64, 8\]"):
        plan(base, adapter)


def test_a_rank_that_is_not_the_configured_one_is_refused(base, adapter):
    change_config(adapter, r=16)
    with pytest.raises(BadInputError, match=r"expected shape \[16, 64\] .* at rank 16, found \[8, 64\]"):
        plan(base, adapter)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("megatron_config", {"tensor_parallel": 2}),
        ("use_qalora", True),
        ("alora_invocation_tokens", [7]),
        ("loftq_config", {"loftq_bits": 4}),
        ("use_dora", "none"),
        ("trainable_token_indices", False),
        ("corda_config", {"cache_file": "x"}),
    ],
)
def test_what_this_lane_does_not_do_is_refused_by_name(base, adapter, field, value):
    change_config(adapter, **{field: value})
    with pytest.raises(UnsupportedError) as error:
        plan(base, adapter)
    assert f"field {field} = {value!r} is not supported by this version" in str(error.value)


def test_dora_as_peft_saves_it_is_refused_by_name(base, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(load_plain(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="use_dora = True is not supported"):
        plan(base, tmp_path / "adapter")


def test_another_method_as_peft_saves_it_is_refused_by_name(base, tmp_path):
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(load_plain(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="peft_type 'IA3' is not supported by this version"):
        plan(base, tmp_path / "adapter")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", ["pissa"], "new"])
def test_initializations_that_change_the_base_are_refused_by_name(base, adapter, init):
    change_config(adapter, init_lora_weights=init)
    with pytest.raises(UnsupportedError) as error:
        plan(base, adapter)
    assert f"init_lora_weights {init!r} changed the base's weights" in str(error.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initializations_that_leave_the_base_alone_are_taken(base, adapter, init):
    change_config(adapter, init_lora_weights=init)
    assert len(plan(base, adapter)) == 14


def test_a_field_that_peft_does_not_know_is_refused(base, adapter):
    change_config(adapter, use_magic=True)
    with pytest.raises(UnsupportedError, match=f"field use_magic = True is unknown to PEFT {peft.__version__}"):
        plan(base, adapter)


@pytest.mark.parametrize(
    "fields", [{"use_magic": False, "magic_config": None}, {"modules_to_save": []}, {"loftq_config": None}], ids=str
)
def test_fields_that_are_off_are_taken(base, adapter, fields):
    change_config(adapter, **fields)
    assert len(plan(base, adapter)) == 14


@pytest.mark.parametrize(
    "fields",
    [
        {"r": "8"},
        {"r": 8.5},
        {"r": 0},
        {"r": -1},
        {"r": 10**30},
        {"r": None},
        {"lora_alpha": "16"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": None},
        {"target_modules": []},
        {"target_modules": "("},
        {"target_modules": 5},
        {"target_modules": [5]},
        {"exclude_modules": "("},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"q_proj": "4"}},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"(": 4}},
        {"alpha_pattern": {"q_proj": "4"}},
        {"layers_to_transform": "first"},
        {"layers_pattern": "("},
        {"lora_dropout": None},
    ],
    ids=str,
)
def test_a_value_that_peft_cannot_use_is_refused(base, adapter, fields):
    change_config(adapter, **fields)
    with pytest.raises(BadInputError) as error:
        plan(base, adapter)
    assert str(adapter / ADAPTER_CONFIG) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", "[" * 99_999])
def test_a_configuration_that_is_none_is_refused(base, adapter, content):
    (adapter / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(BadInputError, match=ADAPTER_CONFIG):
        plan(base, adapter)


def test_missing_files_are_named(base, adapter):
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(NotFoundError, match=ADAPTER_WEIGHTS):
        plan(base, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin: pickled adapters are not read"):
        plan(base, adapter)
    (adapter / ADAPTER_CONFIG).unlink()
    with pytest.raises(NotFoundError, match=ADAPTER_CONFIG):
        plan(base, adapter)


def test_truncated_weights_are_refused(base, adapter):
    data = (adapter / ADAPTER_WEIGHTS).read_bytes()
    (adapter / ADAPTER_WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(BadInputError, match=f"{ADAPTER_WEIGHTS}: .*truncated"):
        plan(base, adapter)


texts = st.sampled_from(["", "q_proj", "[", "a.*", "none"])
scalars = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | texts
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.sampled_from(["q_proj", "[", ""]), scalars)
FIELDS = [*(field.name for field in dataclasses.fields(LoraConfig)), "unheard_of"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), values, max_size=2))
def test_no_configuration_brings_down_more_than_its_own_job(base, plain_adapter, tmp_path, fields):
    shutil.rmtree(tmp_path / "fuzzed", ignore_errors=True)
    adapter = shutil.copytree(plain_adapter, tmp_path / "fuzzed")
    change_config(adapter, **fields)
    try:
        deltas = plan(base, adapter)
    except MergefleetError as error:
        refused = error
    else:
        # Then it is what PEFT makes of it.
        assert {delta.weight: (delta.rank, delta.scaling) for delta in deltas} == layers_of_peft(base, adapter)
        return
    assert isinstance(refused, BadInputError)
