"""What is declared of compressed-tensors, and which weight is of which group."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from jobs.errors import BadInputError, UnsupportedError
from tests.merges import different
from tests.models import build_llama
from tests.stored import is_linear, store, twin_of
from tests.stored.compressed import FORMATS, compress, store_compressed
from tests.stored.reading import is_misread
from workers.bases.forms import Wider
from workers.bases.forms.compressed.group import Group
from workers.bases.forms.compressed.targets import Targets
from workers.bases.forms.declared import declared_form
from workers.bases.quantized_base import QuantizedBase
from workers.files.checkpoint import read_checkpoint
from workers.parity.loading import Room, load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("compressed") / "llama", tokenizer=False)


def declare(base, **fields):
    """Change what a base declares."""
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] |= fields
    (base / "config.json").write_text(json.dumps(config))
    return base


def weights_of(base):
    form = declared_form(base)
    return form, form.weights(specs_of(base))


def specs_of(base):
    return {name: spec for name, (_, spec) in read_checkpoint(base).tensors.items()}


def numbers_of(base):
    form = declared_form(base)
    opened = QuantizedBase.stored(base, read_checkpoint(base), CPU, (), form=form, dtype=torch.bfloat16)
    weights = {name: opened.weight(name) for name in opened.names}
    return {name: weight.dequantize_rows(0, weight.shape[0]) for name, weight in weights.items()}


def group_of(of, targets):
    format_, arguments = FORMATS[of]
    return {"targets": targets, "weights": dict(arguments), "format": format_}


@pytest.mark.parametrize("first_is_of_all", [False, True])
def test_a_group_that_names_a_module_goes_before_one_of_all_linears(llama, tmp_path, first_is_of_all):
    """One checkpoint, attention in FP8 and the rest in INT4: transformers takes all for one group."""
    groups = {
        "attention": group_of("fp8 by channel", ["re:.*self_attn.*"]),
        "rest": group_of("int4 by group", ["Linear"]),
    }
    schemes = {name: QuantizationScheme.model_validate(group) for name, group in groups.items()}

    def quantize(name, weight):
        group = "attention" if "self_attn" in name else "rest"
        return compress(name, weight, groups[group]["format"], schemes[group])

    ordered = dict(reversed(groups.items())) if first_is_of_all else groups
    declared = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": ordered}
    base = store(llama, tmp_path / "mixed", quantize, declared, takes=is_linear)
    twin = load_file(twin_of(base) / "model.safetensors")
    numbers = numbers_of(base)
    assert len(numbers) == 14
    assert different(numbers, {name: twin[name] for name in numbers}) == []
    form, _ = weights_of(base)
    assert "takes it for a weight of another group" in form.misread(specs_of(base), torch.bfloat16)
    assert form.words == "compressed-tensors float-quantized, pack-quantized"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("of", ["fp8 by channel", "int4 by group", "nvfp4", "mxfp4"])
def test_scales_of_another_dtype_than_the_model_round_as_the_library_rounds(llama, tmp_path, of, dtype):
    base = store_compressed(llama, tmp_path / "base", of)
    numbers = {}
    form = declared_form(base)
    opened = QuantizedBase.stored(base, read_checkpoint(base), CPU, (), form=form, dtype=dtype)
    for name in opened.names:
        weight = opened.weight(name)
        numbers[name] = weight.dequantize_rows(0, weight.shape[0])
    twin = load_file(twin_of(base) / "model.safetensors")  # scales are bfloat16, and so are products
    assert different(numbers, {name: twin[name].to(dtype) for name in numbers}) == []


def test_where_only_compression_config_declares_it(llama, tmp_path):
    base = store_compressed(llama, tmp_path / "base", "int4 by group")
    config = json.loads((base / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (base / "config.json").write_text(json.dumps(config))
    twin = load_file(twin_of(base) / "model.safetensors")
    assert different(numbers_of(base), {name: twin[name] for name in numbers_of(base)}) == []
    loaded = load_model(base, Room(device=CPU, scratch=tmp_path))
    assert not loaded.misfits
    state = loaded.model.state_dict()
    assert different({name: state[name] for name in twin}, {name: each.float() for name, each in twin.items()}) == []


def test_weights_are_plain_where_the_cache_alone_is_quantized(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    declared = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    assert declared_form(base) is None
    for quantization in (None, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")):
        loaded, plain = (load_model(each, Room(device=CPU, scratch=tmp_path), quantization) for each in (base, llama))
        assert torch.equal(loaded.logits([1, 2, 3], 3), plain.logits([1, 2, 3], 3))


def test_a_second_scale_without_a_dimension(llama, tmp_path):
    """As converters write it: torch then keeps the quotient in bfloat16, and so does the library."""
    base = store_compressed(llama, tmp_path / "base", "nvfp4")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_global_scale")]:
        tensors[name] = tensors[name].reshape(())
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    format_, arguments = FORMATS["nvfp4"]
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": dict(arguments)})
    for name, numbers in numbers_of(base).items():
        parts = {part: tensors[f"{name}{part.removeprefix('weight')}"] for part in NVFP4_PARTS}
        expected = BaseCompressor.get_value_from_registry(format_).decompress(parts, scheme)["weight"]
        assert torch.equal(numbers, expected)


NVFP4_PARTS = ("weight_packed", "weight_scale", "weight_global_scale")


@pytest.mark.parametrize(
    ("targets", "module", "expected"),
    [
        ([["lm_head"], ["Linear"]], "model.layers.0.mlp.up_proj", 1),
        ([["lm_head"], ["Linear"]], "lm_head", 0),
        ([["Embedding"], ["Linear"]], "model.layers.0.mlp.up_proj", 1),
        ([["Embedding"], ["Linear"]], "model.embed_tokens", 0),
        ([["re:.*mlp.*"], ["model.layers.0.mlp.up_proj"]], "model.layers.0.mlp.up_proj", 1),
        ([["re:.*proj"], ["re:.*mlp.*"]], "model.layers.0.mlp.up_proj", 1),
        ([["Linear"], ["re:.*down_proj"]], "model.layers.0.mlp.down_proj", 1),
    ],
)
def test_the_group_of_a_module_is_that_of_the_library(targets, module, expected):
    schemes = [QuantizationScheme.model_validate({"targets": each, "weights": {"num_bits": 8}}) for each in targets]
    groups = [Group.declared("here", scheme, "int-quantized") for scheme in schemes]
    assert Targets("here", groups, []).group_of(module) is groups[expected]
    kind = torch.nn.Embedding if "embed" in module else torch.nn.Linear
    by_target = {target: group for group in groups for target in group.scheme.targets}
    assert by_target[match_targets(module, kind(2, 2), by_target)[0]] is groups[expected]


def test_codes_of_another_number_of_bits_than_the_group(llama, tmp_path):
    base = store_compressed(llama, tmp_path / "base", "int4 by channel")
    groups = {"g": group_of("int4 by channel", ["Linear"])}
    groups["g"]["weights"]["num_bits"] = 8
    declare(base, config_groups=groups)
    with pytest.raises(BadInputError, match=r"weight_packed has shape .* in 8 bits"):
        numbers_of(base)


@pytest.mark.parametrize("of", ["int8 by channel", "int4 by channel"])
def test_a_group_size_of_minus_one_is_none(llama, tmp_path, of):
    base = store_compressed(llama, tmp_path / "base", of)
    groups = {"g": group_of(of, ["Linear"])}
    groups["g"]["weights"]["group_size"] = -1
    declare(base, config_groups=groups)
    twin = load_file(twin_of(base) / "model.safetensors")
    numbers = numbers_of(base)
    assert different(numbers, {name: twin[name] for name in numbers}) == []
    assert declared_form(base).held_bytes(1000) >= 500


def test_a_format_that_is_not_declared_is_misread(llama, tmp_path):
    base = store_compressed(llama, tmp_path / "base", "int4 by group")
    assert weights_of(base)[0].misread(specs_of(base), torch.bfloat16) is None
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]["format"]
    (base / "config.json").write_text(json.dumps(config))
    assert "its format pack-quantized is not declared" in weights_of(base)[0].misread(specs_of(base), torch.bfloat16)
    assert is_misread(base)


def test_experts_in_one_tensor_are_told_from_plain_weights(llama, tmp_path):
    base = store_compressed(llama, tmp_path / "base", "fp8 by channel")
    form, specs = declared_form(base), specs_of(base)
    codes, scale = (replace(specs[f"model.layers.0.mlp.up_proj.{part}"]) for part in ("weight", "weight_scale"))
    fused = replace(codes, name="model.layers.0.experts.gate_up_proj", shape=(4, 64, 64))
    beside = replace(scale, name=f"{fused.name}_scale")
    with pytest.raises(UnsupportedError, match="experts in one tensor are not read"):
        form.weights({fused.name: fused, beside.name: beside})


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"config_groups": {"g": GROUP | {"weights": GROUP["weights"] | {"num_bits": "many"}}}},
            r"g\.weights\.num_bits",
        ),
        ({"config_groups": {"g": GROUP | {"weights": GROUP["weights"] | {"actorder": "group"}}}}, "has been removed"),
        ({"config_groups": {"g": GROUP | {"format": "marlin-24"}}}, "in marlin-24; of compressed-tensors are read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"\.sparsity_config: the weights are not those"),
        ({"transform_config": {"config_groups": {"u": {}}}}, r"\.transform_config: the weights are not those"),
        ({"transform_config": "some"}, r"\.transform_config: the weights are not those"),
        ({"config_groups": {"W9A9": ["Linear"]}}, "compressed-tensors does not take this"),
        ({"config_groups": {"g": GROUP | {"weights": GROUP["weights"] | {"group_size": "32"}}}}, "does not take this"),
        ({"config_groups": {"g": GROUP | {"targets": ["re:*bad"]}}}, r"target 're:\*bad' is no pattern"),
    ],
)
def test_what_is_not_codes_and_scales_alone_is_refused(llama, tmp_path, fields, message):
    base = declare(store_compressed(llama, tmp_path / "base", "int4 by group"), **fields)
    with pytest.raises(UnsupportedError, match=message):
        declared_form(base)


def test_parts_of_a_module_that_is_in_no_group(llama, tmp_path):
    base = store_compressed(llama, tmp_path / "base", "int4 by group")
    declare(base, ignore=["lm_head", "model.layers.0.mlp.up_proj"])
    with pytest.raises(BadInputError, match=r"takes model\.layers\.0\.mlp\.up_proj into none of its groups"):
        weights_of(base)


def test_a_weight_in_16_bits_among_codes_stays_what_it_is(llama, tmp_path):
    base = store_compressed(llama, tmp_path / "base", "fp8 by channel")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = load_file(llama / "model.safetensors")[name]
    del tensors[f"{name}_scale"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert name not in weights_of(base)[1]


def change(specs, name, **fields):
    return specs | {name: replace(specs[name], **fields)}


@pytest.mark.parametrize(
    ("of", "part", "fields", "error", "message"),
    [
        ("int4 by group", "weight_packed", {"dtype": torch.uint8}, UnsupportedError, "stored as U8; expected I32"),
        (
            "int4 by group",
            "weight_packed",
            {"shape": (64, 7)},
            BadInputError,
            r"has shape \[64, 7\]; expected \[64, 24\]",
        ),
        ("int4 by group", "weight_scale", {"dtype": torch.uint8}, UnsupportedError, "stored as U8; expected BF16 or"),
        ("int8 by channel", "weight", {"shape": (2, 64, 192)}, UnsupportedError, "several experts in one tensor"),
        ("fp8 by channel", "weight", {"dtype": torch.int8}, UnsupportedError, "stored as I8; expected F8_E4M3"),
        ("int4 with zero points", "weight_zero_point", {"shape": (9, 9)}, BadInputError, r"expected \[8, 12\]"),
    ],
)
def test_parts_that_do_not_fit(llama, tmp_path, of, part, fields, error, message):
    base = store_compressed(llama, tmp_path / "base", of)
    form, _ = weights_of(base)
    with pytest.raises(error, match=message):
        form.weights(change(specs_of(base), f"model.layers.0.mlp.down_proj.{part}", **fields))


def test_groups_in_the_order_of_activations_are_refused(llama, tmp_path):
    base = store_compressed(llama, tmp_path / "base", "int4 by group")
    form, _ = weights_of(base)
    specs = specs_of(base)
    module = "model.layers.0.mlp.down_proj"
    order = replace(specs[f"{module}.weight_shape"], name=f"{module}.weight_g_idx")
    with pytest.raises(UnsupportedError, match="weight_g_idx: groups in the order of activations"):
        form.weights(specs | {order.name: order})


def test_a_shape_that_is_not_that_of_the_codes(llama, tmp_path):
    base = shutil.copytree(store_compressed(llama, tmp_path / "base", "int4 by group"), tmp_path / "copy")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_shape"] = torch.tensor([64, 191])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match=r"down_proj\.weight_shape says \[64, 191\]; expected \[64, 192\]"):
        numbers_of(base)


def test_two_groups_that_are_declared_stay_two_beside_a_third(llama, tmp_path):
    """Patterns and classes become names; `match_targets` of the library gives each module the scheme it had."""
    base = store_compressed(llama, tmp_path / "base", of="int4 by group")
    groups = {
        name: {"targets": [target], "weights": dict(FORMATS[of][1])}
        for name, target, of in (("mlp", r"re:.*mlp\..*", "int4 by group"), ("rest", "Linear", "int4 by channel"))
    }
    form = declared_form(declare(base, config_groups=groups))
    linear = [
        f"model.layers.{n}.{each}" for n in (0, 1) for each in ("mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj")
    ]
    in_8_bits, numbers = [linear[1]], [linear[3]]
    in_form = {f"{name}.weight": [name] for name in linear if name not in (*in_8_bits, *numbers)}
    wider = Wider(as_numbers=numbers, in_8_bits=in_8_bits, in_form=in_form, plain=())
    content = form.declared_with(wider)
    assert content["ignore"] == ["lm_head", *numbers]
    assert content["format"] == "pack-quantized"
    declared = content["config_groups"]
    assert declared.keys() == {"mlp", "rest", "group_0"}
    targets = {target: name for name, group in declared.items() for target in group["targets"]}
    module = torch.nn.Linear(1, 1)
    for name in linear:
        expected = {"mlp.up_proj": "mlp"}.get(name.split(".", 3)[3], "rest")
        expected = "group_0" if name in in_8_bits else expected
        matched = match_targets(name, module, targets)
        assert [targets[each] for each in matched] == ([] if name in numbers else [expected])


def test_experts_of_a_layer_are_one_pattern_unless_others_share_it(llama, tmp_path):
    form = declared_form(store_compressed(llama, tmp_path / "base", of="int4 by group"))
    names = [f"model.layers.{n}.mlp.experts.{each}.up_proj" for n in (0, 1, 11) for each in (0, 1)]
    wider = Wider(as_numbers=names[:2], in_8_bits=names[2:4], in_form={f"{n}.weight": [n] for n in names[4:]}, plain=())
    content = form.declared_with(wider)
    patterns = [rf"re:model\.layers\.{n}\.mlp\.experts(\.|$)" for n in (0, 1, 11)]
    assert content["ignore"] == ["lm_head", patterns[0]]
    assert [group["targets"] for group in content["config_groups"].values()] == [[patterns[2]], [patterns[1]]]
    module = torch.nn.Linear(1, 1)
    for name, pattern in zip(names, (each for each in patterns for _ in (0, 1)), strict=True):
        assert match_targets(name, module, patterns) == [pattern]
