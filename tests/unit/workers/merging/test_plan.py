"""Plans: every tensor of the base in exactly one action, the output laid out as the base is, and what cannot be."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.errors import BadInputError, UnsupportedError
from jobs.locations import LocalPath
from jobs.request import BaseQuantization, MergeRequest
from tests.merges import merge_by_peft, plan_pass
from tests.models import build_bnb_4bit, build_llama, build_qwen2, make_adapter
from workers.bases.forms.bitsandbytes_4bit import BITSANDBYTES_4BIT
from workers.merging.base_plan import plan_base
from workers.numerics.tiles import TILE_ELEMENTS
from workers.sources.fetch import fetch_base
from workers.unit.footprint import pass_bytes

LINEARS = 14


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", max_shard_size="100KB", tokenizer=False)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "qv", targets=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def stored(base, tmp_path_factory):
    return build_bnb_4bit(base, tmp_path_factory.mktemp("stored") / "bnb")


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def planned(base, adapter, tmp_path, **fields):
    (plan,) = plan_pass(base, {"job": adapter}, tmp_path / "pass", **fields).plans
    return plan


def base_plan(base, tmp_path, **fields):
    request = MergeRequest(base=str(base), adapter="/adapter", destination="/destination", **fields)
    return plan_base(fetch_base(LocalPath(base), tmp_path / "cache"), request)


def change_config(base, **fields):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_output_has_the_files_of_the_base_to_the_byte(base, adapter, tmp_path):
    plan = planned(base, adapter, tmp_path)
    assert plan.output == plan.base.layout
    for shard in plan.output.shards:
        assert (base / shard.name).read_bytes().startswith(shard.header)


def test_only_changed_tensors_are_computed(base, adapter, tmp_path):
    plan = planned(base, adapter, tmp_path)
    tensors = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    changed = {name for name in tensors if "q_proj" in name or "v_proj" in name}
    assert set(plan.deltas) == changed
    assert plan.num_bytes_changed == sum(tensors[name].nbytes for name in changed)
    assert plan.num_adapter_bytes == sum(t.nbytes for t in load_file(adapter / "adapter_model.safetensors").values())
    assert plan.num_bytes_read == plan.num_adapter_bytes + sum(
        path.stat().st_size for path in base.glob("*.safetensors")
    )


def test_a_note_names_a_directory_in_visible_characters(base, adapter, tmp_path):
    there = shutil.copytree(adapter, tmp_path / "ad\u202eretpa\x9b31m")
    config = json.loads((there / "adapter_config.json").read_text())
    (there / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/b\u3164-gptq"}))
    (note,) = planned(base, there, tmp_path).notes
    assert "ad\\u202eretpa\\x9b31m was trained on 'org/b\\u3164-gptq'" in note


def test_quantized_linears_are_computed_too(base, adapter, tmp_path):
    plan = planned(base, adapter, tmp_path, base_quantization="nf4")
    dequantized = {tensor.name for tensor in plan.base.tensors if tensor.stored is None}
    assert len(dequantized) == LINEARS
    assert dequantized == set(plan.base.quantization.weights)
    assert plan.num_bytes_changed == sum(t.num_bytes for t in plan.base.tensors if t.name in dequantized)
    assert plan.output == plan.base.layout


def test_another_dtype_computes_everything(base, adapter, tmp_path):
    plan = planned(base, adapter, tmp_path, dtype="float32")
    assert plan.num_bytes_changed == plan.output.total_size == 2 * plan.base.layout.total_size
    assert [shard.name for shard in plan.output.shards] == [shard.name for shard in plan.base.layout.shards]
    for name, (shard, spec) in plan.output.tensors.items():
        own_shard, own = plan.base.layout.tensors[name]
        assert (shard.name, spec.shape, spec.dtype) == (own_shard.name, own.shape, torch.float32)


def test_memory_of_a_pass_grows_with_the_bytes_of_an_element(base, adapter, tmp_path):
    """Four buffers of a tile for each thread, and six more: those of float32 are twice as large."""
    in_16_bits, in_32_bits = (planned(base, adapter, tmp_path, dtype=dtype) for dtype in ("bfloat16", "float32"))
    more = pass_bytes([in_32_bits], 2, "cpu") - pass_bytes([in_16_bits], 2, "cpu")
    assert more == (2 * 4 + 6) * 2 * TILE_ELEMENTS["cpu"]


def test_the_dtype_the_base_has_already_changes_nothing(base, adapter, tmp_path):
    plan = planned(base, adapter, tmp_path, dtype="bfloat16")
    assert plan.output == plan.base.layout


def test_integers_keep_their_dtype(copy, adapter, tmp_path):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    save_file({"model.counter": torch.arange(5)}, copy / "extra.safetensors", metadata={"format": "pt"})
    index["weight_map"]["model.counter"] = "extra.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = planned(copy, adapter, tmp_path, dtype="float16")
    assert plan.output.tensors["model.counter"][1].dtype == torch.int64


@pytest.mark.parametrize("limit", ["60KB", "150KB", "10MB"])
def test_shards_keep_to_the_size_asked_for_as_those_of_transformers(base, adapter, tmp_path, limit):
    plan = planned(base, adapter, tmp_path, max_shard_size=limit)
    reference = merge_by_peft(base, adapter, tmp_path / "reference", max_shard_size=limit)
    assert plan.output.tensors.keys() == reference.keys()
    num_bytes = {
        shard.name: sum(spec.num_bytes for spec in shard.tensors if len(shard.tensors) > 1)
        for shard in plan.output.shards
    }
    assert max(num_bytes.values()) <= plan.request.max_shard_size
    num_files = len(list((tmp_path / "reference").glob("*.safetensors")))
    assert abs(len(num_bytes) - num_files) <= 1
    assert plan.output.index() is None if num_files == 1 else plan.output.index() is not None


def test_a_base_stored_in_4_bit_becomes_plain(stored, adapter, tmp_path, base):
    plan = planned(stored, adapter, tmp_path, base_quantization="nf4")
    assert plan.base.quantization is None
    assert plan.base.form is BITSANDBYTES_4BIT
    expected = {name: tuple(t.shape) for path in base.glob("*.safetensors") for name, t in load_file(path).items()}
    assert {name: spec.shape for name, (_, spec) in plan.output.tensors.items()} == expected
    assert {spec.dtype for _, spec in plan.output.tensors.values()} == {torch.bfloat16}


def test_the_default_quantization_is_what_the_base_is_stored_in(stored, tmp_path):
    assert MergeRequest(base="/b", adapter="/a", destination="/d").base_quantization is BaseQuantization.DEFAULT
    assert base_plan(stored, tmp_path).form is BITSANDBYTES_4BIT


def test_a_declared_form_that_no_tensor_has_is_refused(copy, tmp_path):
    change_config(copy, quantization_config={"quant_method": "fp8"})
    with pytest.raises(BadInputError, match=r"declares weights in FP8, and no tensor is stored as F8.*take it away"):
        base_plan(copy, tmp_path, base_quantization="stored")


@pytest.mark.parametrize("quantization", ["none", "fp4"])
def test_a_base_stored_in_4_bit_has_no_other_weights(stored, tmp_path, quantization):
    with pytest.raises(UnsupportedError) as error:
        base_plan(stored, tmp_path, base_quantization=quantization)
    message = str(error.value)
    assert "stored in nf4" in message
    assert f"found base_quantization: {quantization}" in message


def test_options_cannot_change_how_a_base_is_stored(stored, tmp_path):
    for options in ({}, {"bnb_4bit_use_double_quant": False}):
        assert base_plan(stored, tmp_path, quantization_options=options).form is BITSANDBYTES_4BIT
    with pytest.raises(UnsupportedError, match="quantization_options cannot change that"):
        base_plan(stored, tmp_path, quantization_options={"bnb_4bit_use_double_quant": True})
    with pytest.raises(UnsupportedError, match="quantization_options cannot change that"):
        base_plan(stored, tmp_path, quantization_options={"llm_int8_skip_modules": ["q_proj"]})


@pytest.mark.parametrize("method", ["gptq", "hqq", "aqlm"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_other_quantized_formats_are_refused_by_name(copy, tmp_path, method, quantization):
    change_config(copy, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    with pytest.raises(UnsupportedError, match=f"method '{method}'"):
        base_plan(copy, tmp_path, base_quantization=quantization)


def test_a_configuration_that_denies_4_bit_tensors_is_refused(stored, tmp_path):
    lying = shutil.copytree(stored, tmp_path / "lying")
    config = json.loads((lying / "config.json").read_text())
    del config["quantization_config"]
    (lying / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="stored in no 4-bit type, the tensors say nf4"):
        base_plan(lying, tmp_path)


def test_a_configuration_that_claims_4_bit_tensors_is_refused(copy, stored, tmp_path):
    claim = json.loads((stored / "config.json").read_text())["quantization_config"]
    change_config(copy, quantization_config=claim)
    with pytest.raises(BadInputError, match="stored in nf4, the tensors say no 4-bit type"):
        base_plan(copy, tmp_path)


def test_a_configuration_that_claims_another_type_is_refused(stored, tmp_path):
    lying = shutil.copytree(stored, tmp_path / "lying")
    claim = json.loads((lying / "config.json").read_text())["quantization_config"] | {"bnb_4bit_quant_type": "fp4"}
    change_config(lying, quantization_config=claim)
    with pytest.raises(BadInputError, match="stored in fp4, the tensors say nf4"):
        base_plan(lying, tmp_path, base_quantization="fp4")


def test_a_4_bit_tensor_of_no_module_is_refused(stored, tmp_path):
    more = shutil.copytree(stored, tmp_path / "more")
    tensors = load_file(more / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.1.mlp.up_proj.weight")]:
        tensors[name.replace("model.layers.1", "mtp")] = tensors[name].clone()
    save_file(tensors, more / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"tensor mtp\.mlp\.up_proj\.weight is stored in codes .* belongs to no"):
        base_plan(more, tmp_path)


@pytest.mark.parametrize("fields", [{"intermediate_size": 128}, {"vocab_size": 100}])
def test_weights_that_are_not_of_the_configuration_are_refused(copy, tmp_path, fields):
    change_config(copy, **fields)
    with pytest.raises(BadInputError, match=r"tensor \S+ has shape .* config\.json makes it"):
        base_plan(copy, tmp_path)


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 10**12}, {"text_config": {"num_hidden_layers": 22}}, {"num_layers": -1}], ids=str
)
def test_more_layers_than_tensors_are_refused_before_they_are_built(copy, tmp_path, fields):
    change_config(copy, **fields)
    with pytest.raises(BadInputError, match=r"config\.json: num_(hidden_)?layers: expected 0 to 21, .* found"):
        base_plan(copy, tmp_path)


@pytest.mark.parametrize("entry", ["lm_haed", "model.layers.7", "proj_q"])
def test_an_entry_of_the_skip_list_that_names_nothing_is_refused(base, tmp_path, entry):
    with pytest.raises(BadInputError, match=f"llm_int8_skip_modules: '{entry}' names no module"):
        base_plan(base, tmp_path, quantization_options={"llm_int8_skip_modules": ["lm_head", entry]})


@pytest.mark.parametrize("entry", ["lm_head", "model.layers.1", "q_proj", "model.layers.0.mlp.up_proj"])
def test_an_entry_of_the_skip_list_that_names_something_is_taken(base, tmp_path, entry):
    plan = base_plan(base, tmp_path, quantization_options={"llm_int8_skip_modules": [entry]})
    assert not any(entry in name for name in plan.quantization.weights)


def test_a_skip_list_that_leaves_nothing_is_refused(base, tmp_path):
    with pytest.raises(BadInputError, match="converts no weight of this base"):
        base_plan(base, tmp_path, quantization_options={"llm_int8_skip_modules": ["model", "lm_head"]})


def test_a_skip_list_that_converts_a_tied_head_is_refused(tmp_path):
    tied = build_qwen2(tmp_path / "tied", tokenizer=False)
    with pytest.raises(UnsupportedError, match=r"would convert lm_head\.weight, which the base stores tied"):
        base_plan(tied, tmp_path, quantization_options={"llm_int8_skip_modules": ["q_proj"]})
    plan = base_plan(tied, tmp_path, quantization_options={"llm_int8_skip_modules": ["q_proj", "lm_head"]})
    assert len(plan.quantization.weights) == LINEARS - 2


def test_weights_that_cannot_be_added_to_are_refused(copy, adapter, tmp_path):
    path = next(
        path for path in copy.glob("*.safetensors") if "model.layers.0.self_attn.q_proj.weight" in load_file(path)
    )
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].double()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.weight is torch\.float64"):
        planned(copy, adapter, tmp_path)


def test_the_merge_key_follows_what_decides_the_bytes(base, adapter, tmp_path):
    plan = planned(base, adapter, tmp_path)
    other = make_adapter(base, tmp_path / "other", targets=["q_proj", "v_proj"], seed=9)
    assert planned(base, adapter, tmp_path).merge_key == plan.merge_key
    keys = {
        plan.merge_key,
        planned(base, other, tmp_path).merge_key,
        planned(base, adapter, tmp_path, base_quantization="nf4").merge_key,
        planned(base, adapter, tmp_path, dtype="float32").merge_key,
        planned(base, adapter, tmp_path, max_shard_size="1MB").merge_key,
    }
    assert len(keys) == 5
