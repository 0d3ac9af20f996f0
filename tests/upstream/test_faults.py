"""Faults of the libraries that this project works around: each as small as it gets, each still there.

`docs/upstream-faults.md` says what follows from each. A test that fails here is good news: the library does it right
now, and what was done about it can go.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.compressed_tensors import CompressedTensorsDequantize
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests import architectures
from tests.combinations import combine_by_peft
from tests.merges import dequantize_without_kernel, load_dequantized
from tests.methods import make_method_adapter, save_old_adapter
from tests.models import build_bnb_4bit, build_llama, load_plain, make_adapter
from tests.stored.compressed import FORMATS, compress
from tests.stored.fp8_blocks import dequantize_fp8
from workers.parity.inference import quiet_libraries

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("upstream")


@pytest.fixture(scope="module")
def llama(places):
    return build_llama(places / "llama", tokenizer=False)


@pytest.fixture(autouse=True)
def _quiet():
    with quiet_libraries():
        yield


def test_transformers_dequantizes_conv1d_into_its_transpose(places):
    base = architectures.build("decoder", "gpt2", places / "gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert load_plain(base).state_dict()[name].shape == (64, 256)
    assert load_dequantized(base, NF4).state_dict()[name].shape == (256, 64)


def test_transformers_leaves_a_dequantized_model_marked_as_4bit(llama, places):
    adapter = make_method_adapter(llama, places / "ia3", "IA3")
    model = PeftModel.from_pretrained(load_dequantized(llama, NF4), adapter)
    assert model.base_model.model.is_loaded_in_4bit
    with pytest.raises(ValueError, match="4-bit mode"):
        model.merge_and_unload()


def test_transformers_cannot_save_what_it_dequantized_of_a_4bit_checkpoint(llama, places, tmp_path):
    model = load_dequantized(build_bnb_4bit(llama, places / "stored"), None)
    with pytest.raises((NotImplementedError, AttributeError, KeyError, ValueError)):
        model.save_pretrained(tmp_path)


def test_transformers_loads_a_4bit_checkpoint_in_another_dtype_than_it_is_told(llama, places):
    stored = build_bnb_4bit(llama, places / "stored-bf16")
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32, device_map="cpu")
    assert model.model.norm.weight.dtype is torch.bfloat16


def test_transformers_rounds_in_4bit_what_it_keeps_in_float32_otherwise(places):
    base = architectures.build("decoder", "hy_v4", places / "hy_v4")
    plain, through_4bit = load_plain(base).state_dict(), load_dequantized(base, NF4).state_dict()
    rounded = [name for name in plain if plain[name].dtype is torch.float32 != through_4bit[name].dtype]
    assert rounded


def test_peft_saves_a_merged_t5_without_a_tied_tensor_that_came_apart(places, tmp_path):
    base = architectures.build("encoder-decoder", "t5", places / "t5")
    fields = {"task_type": None, "r": 4, "modules_to_save": ["shared", "lm_head"]}
    adapter = make_method_adapter(base, tmp_path / "adapter", "LORA", target_modules="all-linear", **fields)
    merged = PeftModel.from_pretrained(load_plain(base), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load_plain(tmp_path / "merged").state_dict()
    lost = [name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, again[name])]
    assert lost


@pytest.mark.skipif(
    not re.search(r"\bavx512f\b", Path("/proc/cpuinfo").read_text()), reason="the kernel is for CPUs with AVX-512"
)
def test_bitsandbytes_takes_the_scales_of_other_blocks_in_its_avx512_kernel():
    weight = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 10, 64)[:, None]
    codes, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")
    assert not torch.equal(bnb.dequantize_4bit(codes, state), dequantize_without_kernel(codes, state))


@pytest.mark.parametrize("model_type", ["laguna", "inkling2_text"])
def test_peft_drops_tensors_of_its_own_adapter(places, tmp_path, model_type):
    base = places / model_type
    if not base.exists():
        architectures.build("decoder", model_type, base)
    fields = {"task_type": None, "r": 4, "target_modules": "all-linear"}
    adapter = make_method_adapter(base, tmp_path / "adapter", "LORA", **fields)
    model = PeftModel(load_plain(base), PeftConfig.from_pretrained(str(adapter)))
    found = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert found.unexpected_keys
    # Without a word: this is what everybody calls.
    PeftModel.from_pretrained(load_plain(base), adapter)


def test_peft_scales_single_experts_of_rslora_by_sqrt_2_too_much(places, tmp_path):
    base = places / "mixtral"
    if not base.exists():
        architectures.build("decoder", "mixtral", base)
    save_old_adapter(base, tmp_path / "adapter", target_modules=["w1", "w2", "w3"], r=4, lora_alpha=8, use_rslora=True)
    model = PeftModel.from_pretrained(load_plain(base), tmp_path / "adapter")
    parts = [part for part in model.modules() if getattr(part, "parameter_name", None) == "gate_up_proj"]
    assert [part.scaling["default"] for part in parts] == pytest.approx([math.sqrt(2) * 8 / math.sqrt(4)] * 2)


def test_peft_takes_tensors_of_another_shape_for_adamss(llama, places):
    adapter = make_method_adapter(llama, places / "adamss", "ADAMSS")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "adamss_B" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    PeftModel.from_pretrained(load_plain(llama), adapter)


def test_peft_gives_a_combination_the_scaling_of_rslora_where_that_comes_first(llama, places):
    rank = 4
    first = make_adapter(llama, places / "rslora", rank=rank, rslora=True, seed=1)
    second = make_adapter(llama, places / "plain", rank=rank, seed=2)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    scaled, right = (
        combine_by_peft(llama, order, weights, combination_type="linear").get_submodule(layer).get_delta_weight("all")
        for order, weights in (((first, second), (0.3, 0.7)), ((second, first), (0.7, 0.3)))
    )
    torch.testing.assert_close(scaled, right * math.sqrt(rank), rtol=1e-4, atol=1e-6)


def test_peft_rounds_what_it_concatenates_to_the_dtype_of_the_base(llama, places):
    adapters = [make_adapter(llama, places / f"float32-{seed}", rank=4, seed=seed) for seed in (1, 2)]
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    combined = combine_by_peft(llama, adapters, (0.5, 0.5), combination_type="cat").get_submodule(layer)
    assert combined.lora_A["adapter0"].weight.dtype is torch.float32
    assert combined.lora_A["all"].weight.dtype is torch.bfloat16


def test_transformers_zeroes_the_row_of_the_padding_token_that_it_loads(places):
    base = architectures.build("decoder", "youtu", places / "youtu")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] = 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert load_plain(base).get_input_embeddings().weight[0].count_nonzero() == 0


def test_transformers_scales_cut_blocks_of_fp8_by_those_of_others():
    codes, scales = torch.ones(24, 16).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]])
    right = dequantize_fp8(codes, scales, (16, 16), torch.float32)
    assert right[12, 0] == 1
    assert Fp8Dequantize(None)._dequantize_one(codes, scales)[12, 0] == 2
    with pytest.raises(ValueError, match="not divisible by scale grid"):
        Fp8Dequantize(None)._dequantize_one(torch.ones(40, 16).to(torch.float8_e4m3fn), torch.ones(3, 1))


def dequantize_by_transformers(config, tensors):
    """Return what transformers makes of the parts of some weights, as it does while it loads a model in bfloat16."""
    own = QuantizationConfig.model_validate({"quant_method": "compressed-tensors", **config})
    quantizer = SimpleNamespace(compressor=SimpleNamespace(quantization_config=own))
    model = SimpleNamespace(get_parameter=lambda _: torch.empty(0, dtype=torch.bfloat16))
    return CompressedTensorsDequantize(quantizer).convert(tensors, [], [], full_layer_name="weight", model=model)


def test_transformers_loses_the_global_scale_of_experts_in_nvfp4():
    format_, arguments = FORMATS["nvfp4"]
    group = {"targets": ["Linear"], "weights": dict(arguments), "format": format_}
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts, right = compress("up_proj.weight", weight, format_, QuantizationScheme.model_validate(group))
    loaded = dequantize_by_transformers({"config_groups": {"group_0": group}}, {n: [t] for n, t in parts.items()})
    found = loaded["up_proj.weight_packed"][0]
    assert not torch.allclose(found, right, rtol=0.5)
    assert torch.allclose(found.float() / parts["up_proj.weight_global_scale"], right.float(), rtol=0.02)


def test_transformers_takes_all_weights_for_those_of_one_group():
    """A mixed checkpoint is refused, since a weight in 4 bits is looked for among those in 8."""
    groups = {}
    for name in ("int8 by channel", "int4 by group"):
        format_, arguments = FORMATS[name]
        groups[name] = {"targets": [f"re:.*{name}"], "weights": dict(arguments), "format": format_}
    scheme = QuantizationScheme.model_validate(groups["int4 by group"])
    parts, right = compress("weight", torch.eye(32).bfloat16(), "pack-quantized", scheme)
    alone = {"config_groups": {"int4 by group": groups["int4 by group"]}}
    assert torch.equal(dequantize_by_transformers(alone, dict(parts))["weight"], right)
    with pytest.raises(KeyError):
        dequantize_by_transformers({"config_groups": groups}, dict(parts))


def test_transformers_drops_experts_that_are_numbers_beside_packed_ones():
    """Beside FP8 they pass."""
    numbers = {"up_proj.weight": [torch.eye(32).bfloat16()]}
    for name, taken in (("int4 by group", False), ("mxfp4", False), ("fp8 by channel", True)):
        format_, arguments = FORMATS[name]
        group = {"targets": ["Linear"], "weights": dict(arguments), "format": format_}
        found = dequantize_by_transformers({"config_groups": {"group_0": group}}, dict(numbers))
        assert found == (numbers if taken else {})


def test_every_fault_is_in_the_table():
    page = (Path(__file__).parents[2] / "docs" / "upstream-faults.md").read_text()
    tests = re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE)
    listed = re.findall(r"`(test_\w+)`", page)
    assert sorted(listed) == sorted(name for name in tests if name != "test_every_fault_is_in_the_table")
