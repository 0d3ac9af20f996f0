"""Adapters that do not fit, lack something or bring too much are refused, and the message names what."""

import dataclasses
import json
import math
import re
import shutil

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from jobs.errors import BadInputError, MergefleetError, NotFoundError, UnsupportedError
from tests.methods import make_method_adapter
from tests.models import build_llama, build_qwen2, make_adapter
from workers.adapters.adapter import ADAPTER_WEIGHTS, open_adapter
from workers.adapters.config import ADAPTER_CONFIG
from workers.adapters.coverage import cover
from workers.bases.model import skeleton


def plan(base, adapter):
    """Return the names of the tensors that the adapter changes."""
    return cover(open_adapter(adapter), skeleton(base)).shapes


def change_config(adapter, **fields):
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(adapter, change):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)


def test_an_adapter_for_a_base_of_another_width_is_refused(base, tmp_path):
    wide = build_llama(tmp_path / "wide", hidden_size=128, tokenizer=False)
    adapter = make_adapter(wide, tmp_path / "adapter")
    with pytest.raises(BadInputError) as error:
        plan(base, adapter)
    message = str(error.value)
    assert re.search(r"tensor \S+lora_[AB]\.weight: expected shape \[.*\] for this base .* found \[.*\]", message)
    assert "trained on another base" in message


def test_an_adapter_for_a_deeper_base_is_refused(base, tmp_path):
    deep = build_llama(tmp_path / "deep", num_hidden_layers=3, tokenizer=False)
    adapter = make_adapter(deep, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"14 tensors belong to nothing .*model\.layers\.2\."):
        plan(base, adapter)


def test_an_adapter_for_a_shallower_base_is_refused(base, tmp_path):
    shallow = build_llama(tmp_path / "shallow", num_hidden_layers=1, tokenizer=False)
    adapter = make_adapter(shallow, tmp_path / "adapter")
    with pytest.raises(BadInputError, match=r"expected tensor .*layers\.1\..*found none .*; the file holds 14 tensors"):
        plan(base, adapter)


def test_an_adapter_that_matches_nothing_is_refused(base, adapter):
    change_config(adapter, target_modules=["query_key_value"])
    with pytest.raises(BadInputError, match=r"does not fit this base, LlamaForCausalLM: .* not found"):
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
        f"{NAME}.lora_E",
        f"{NAME}.lora_B.bias",
        "base_model.model.lm_head.bias",
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
    with pytest.raises(BadInputError, match=r"expected shape \[16, \d+\] .* found \[8, \d+\]"):
        plan(base, adapter)


def test_a_tensor_of_the_base_has_to_fit_it(base, adapter):
    name = "base_model.model.model.embed_tokens.weight"
    change_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(BadInputError, match=rf"size mismatch for {name}: .*\[3\].*\[512, 64\]"):
        plan(base, adapter)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 2]]),
        ("megatron_config", {"tensor_parallel": 2}),
        ("use_qalora", True),
        ("alora_invocation_tokens", [7]),
        ("arrow_config", {"top_k": 2}),
    ],
)
def test_what_changes_no_weight_of_the_base_is_refused_by_name(base, adapter, field, value):
    change_config(adapter, **{field: value})
    with pytest.raises(UnsupportedError) as error:
        plan(base, adapter)
    assert f"field {field} = {value!r} is not supported by this version" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("use_dora", True, "lora_magnitude_vector"),
        ("lora_bias", True, "lora_B.bias"),
        ("modules_to_save", ["lm_head"], "lm_head.weight"),
        ("trainable_token_indices", [1, 2], "trainable_tokens_delta"),
    ],
)
def test_what_the_configuration_promises_has_to_be_there(base, adapter, field, value, named):
    change_config(adapter, **{field: value})
    with pytest.raises(BadInputError, match=named):
        plan(base, adapter)


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"bias": "lora_only"}, "model.layers.0.self_attn.q_proj.base_layer.bias"),
        ({"bias": "all"}, "model.layers.0.self_attn.k_proj.bias"),
        ({"modules_to_save": ["norm"]}, "model.norm.weight"),
    ],
    ids=["bias", "bias-of-another-layer", "module"],
)
def test_what_was_trained_beside_it_has_to_be_there_whatever_else_is(tmp_path, fields, lost):
    """PEFT saves the weight below an adapter of a head, which nothing asks for."""
    base = build_qwen2(tmp_path / "base", tokenizer=False, num_hidden_layers=1)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj", "lm_head"], **fields)
    change_tensors(adapter, lambda tensors: tensors.pop(f"base_model.model.{lost}"))
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / ADAPTER_WEIGHTS)
    with pytest.raises(BadInputError, match=f"expected tensor base_model.model.{lost} .* found none"):
        plan(base, adapter)


def test_a_method_that_cannot_be_merged_is_refused_with_the_reason(base, tmp_path):
    adapter = make_method_adapter(base, tmp_path / "adapter", "LILY")
    with pytest.raises(UnsupportedError, match=r"peft_type 'LILY': PEFT cannot merge it: .* depend on the input"):
        plan(base, adapter)


@pytest.mark.parametrize("method", ["lora", "NEWEST", None, 7, ["LORA"]])
def test_a_method_that_nobody_knows_is_refused_by_name(base, adapter, method):
    change_config(adapter, peft_type=method)
    with pytest.raises(UnsupportedError) as error:
        plan(base, adapter)
    assert f"peft_type {method!r} is unknown to this version; expected one of ADALORA, " in str(error.value)


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


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("r", "4", "a number, found '4'"),
        ("r", 4.0, "a whole number, found 4.0"),
        ("r", math.nan, "a whole number, found NaN"),
        ("lora_alpha", "16", "a number, found '16'"),
        ("lora_alpha", [16], "a number, found"),
        ("lora_alpha", True, "a number, found true"),
        ("use_dora", "false", "true or false, found 'false'"),
        ("fan_in_fan_out", "no", "true or false, found 'no'"),
        ("target_modules", "*q_proj", r"a regular expression, found '\*q_proj': nothing to repeat"),
        ("exclude_modules", "(", "a regular expression, found '\\('"),
        ("rank_pattern", {"[": 4}, "a regular expression, found '\\['"),
        ("alpha_pattern", {"(": 4}, "a regular expression, found '\\('"),
    ],
)
def test_a_value_of_another_type_is_told_by_its_field(base, adapter, field, value, expected):
    change_config(adapter, **{field: value})
    with pytest.raises(BadInputError, match=f"field {field}: expected {expected}"):
        plan(base, adapter)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", "[" * 99_999])
def test_a_configuration_that_is_none_is_refused(base, adapter, content):
    (adapter / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(BadInputError, match=ADAPTER_CONFIG):
        plan(base, adapter)


def test_missing_files_are_named(base, adapter):
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(NotFoundError, match=ADAPTER_WEIGHTS):
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
        changed = plan(base, adapter)
    except MergefleetError as error:
        refused = error
    else:
        assert changed
        return
    assert isinstance(refused, BadInputError)
