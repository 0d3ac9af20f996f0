"""What PEFT merges over mapped weights is, bit for bit, what it merges over the loaded model."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, ResNetConfig, ResNetModel, SiglipVisionConfig, SiglipVisionModel

from jobs.errors import BadInputError, UnsupportedError
from tests.merges import different, merge, merge_by_peft, plan_pass, read_tensors
from tests.methods import make_method_adapter
from tests.models import build_bnb_4bit, build_llama, build_qwen2, load_plain, make_adapter
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.adapters.methods import MERGED, SHAPED_BY_VALUES

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False, max_shard_size="100KB")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return build_qwen2(tmp_path_factory.mktemp("base") / "qwen2", tokenizer=False)


@pytest.fixture
def base_of(llama, qwen2):
    return lambda method: qwen2 if method == "BEFT" else llama


def merged_and_checked(base, adapter, directory, **fields):
    """Return the engine's tensors; its own checks have to pass."""
    planned = plan_pass(base, {"job": adapter}, directory, accept_unstable=True, **fields)
    result = planned.run()
    assert not result.errors, result.errors
    checks = planned.check()["job"]
    assert max(check.rounding_excess for check in checks.values()) <= 1
    assert not any(check.num_bad_elements for check in checks.values())
    assert {name for name, check in checks.items() if check.targeted} == planned.plans[0].changed
    return read_tensors(planned.output("job"))


@pytest.mark.parametrize("method", sorted(MERGED))
def test_every_method(base_of, tmp_path, method):
    base = base_of(method)
    adapter = make_method_adapter(base, tmp_path / "adapter", method)
    merged = merged_and_checked(base, adapter, tmp_path)
    assert different(merged, merge_by_peft(base, adapter, tmp_path / "peft")) == []
    assert different(merged, read_tensors(base)) != []


# PEFT refuses to merge IA3 into a model that ever was in 4-bit, dequantized or not.
@pytest.mark.parametrize("method", ["BOFT", "C3A", "LOHA", "OSF", "VBLORA"])
def test_through_4_bits_and_back(llama, tmp_path, method):
    adapter = make_method_adapter(llama, tmp_path / "adapter", method)
    merged = merged_and_checked(llama, adapter, tmp_path, base_quantization="nf4")
    assert different(merged, merge_by_peft(llama, adapter, tmp_path / "peft", quantization=NF4)) == []


def test_a_method_that_peft_refuses_after_4_bits_is_merged_into_the_same_weights(llama, tmp_path):
    adapter = make_method_adapter(llama, tmp_path / "adapter", "IA3")
    with pytest.raises(ValueError, match="Cannot merge ia3 layers when the model is loaded in 4-bit mode"):
        merge_by_peft(llama, adapter, tmp_path / "refused", quantization=NF4)
    # The base without an adapter, through 4 bits and back, is a base like any other.
    nothing = make_adapter(llama, tmp_path / "nothing", std=0.0)
    dequantized = build_llama(tmp_path / "dequantized", tokenizer=False)
    weights = merge(llama, nothing, tmp_path / "nothing-merged", base_quantization="nf4")
    save_file(weights, dequantized / "model.safetensors", metadata={"format": "pt"})
    merged = merged_and_checked(llama, adapter, tmp_path, base_quantization="nf4")
    assert different(merged, merge_by_peft(dequantized, adapter, tmp_path / "peft")) == []


def test_a_base_stored_in_4_bits(llama, tmp_path):
    stored = build_bnb_4bit(llama, tmp_path / "stored")
    adapter = make_method_adapter(llama, tmp_path / "adapter", "LOKR")
    merged = merged_and_checked(stored, adapter, tmp_path, base_quantization="nf4")
    assert different(merged, merge_by_peft(stored, adapter, tmp_path / "peft", dequantize=True)) == []


@pytest.mark.parametrize("method", ["FOURIERFT", "HRA", "LOHA", "LN_TUNING", "VERA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bases_of_other_dtypes(tmp_path, method, dtype):
    base = build_llama(tmp_path / "base", dtype=dtype, tokenizer=False)
    adapter = make_method_adapter(base, tmp_path / "adapter", method)
    merged = merged_and_checked(base, adapter, tmp_path)
    assert different(merged, merge_by_peft(base, adapter, tmp_path / "peft")) == []


def test_another_dtype_is_cast_before_the_merge(llama, tmp_path):
    adapter = make_method_adapter(llama, tmp_path / "adapter", "LOHA")
    merged = merged_and_checked(llama, adapter, tmp_path, dtype="float32")
    theirs = merge_by_peft(llama, adapter, tmp_path / "peft", dtype=torch.float32)
    assert different(merged, theirs) == []


KINDS = {
    "dora": {"use_dora": True},
    "dora and rank-stabilized": {"use_dora": True, "rslora": True, "rank_pattern": {"q_proj": 3}},
    "bias of lora_B": {"lora_bias": True, "targets": ["q_proj", "v_proj"]},
    "all biases": {"bias": "all"},
    "biases of the layers": {"bias": "lora_only", "targets": ["q_proj", "o_proj"]},
    "embeddings": {"targets": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": [3, 99, 511]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_lora_beyond_linear_weights(tmp_path, kind):
    base = build_qwen2(tmp_path / "qwen2", tokenizer=False, tie_word_embeddings=False)
    fields = dict(KINDS[kind])
    adapter = make_adapter(base, tmp_path / "adapter", trained=True, **fields)
    merged = merged_and_checked(base, adapter, tmp_path)
    assert different(merged, merge_by_peft(base, adapter, tmp_path / "peft")) == []


@pytest.mark.parametrize("method", ["LORA", "LOHA"])
def test_models_that_look_nothing_up(tmp_path, method):
    """Neither the merge nor its check asks a model of images for embeddings of tokens."""
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path / "base")
    adapter = make_method_adapter(
        tmp_path / "base", tmp_path / "adapter", method, task_type=None, target_modules=["convolution"]
    )
    merged = merged_and_checked(tmp_path / "base", adapter, tmp_path, parity={"level": "arithmetic"})
    assert different(merged, merge_by_peft(tmp_path / "base", adapter, tmp_path / "peft")) == []


def test_an_attention_of_torchs_own(tmp_path):
    """Expected is what base + adapter answers, unmerged, in float64; that PEFT counts one projection twice is in it."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipVisionConfig(**shape, image_size=28, patch_size=14)
    SiglipVisionModel(config).save_pretrained(tmp_path / "base")
    fields = {"task_type": None, "target_modules": ["attention", "q_proj"], "r": 4, "lora_alpha": 8}
    adapter = make_method_adapter(tmp_path / "base", tmp_path / "adapter", "LORA", **fields)
    merged = merged_and_checked(tmp_path / "base", adapter, tmp_path, parity={"level": "arithmetic"})
    before = read_tensors(tmp_path / "base")
    for end in ("in_proj_weight", "out_proj.weight"):
        assert not torch.equal(merged[f"head.attention.{end}"], before[f"head.attention.{end}"])
    pixels = torch.randn(2, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = PeftModel.from_pretrained(load_plain(tmp_path / "base"), adapter).double()(pixel_values=pixels)
    ours = load_plain(tmp_path / "base")
    ours.load_state_dict(merged)
    assert torch.allclose(ours.double()(pixel_values=pixels).pooler_output, expected.pooler_output, atol=1e-6)


def test_both_lanes_serve_one_adapter(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter", modules_to_save=["lm_head", "embed_tokens"], trained=True)
    planned = plan_pass(llama, {"job": adapter}, tmp_path / "plan")
    (plan,) = planned.plans
    assert set(plan.by_peft) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert len(plan.deltas) == 14
    merged = merged_and_checked(llama, adapter, tmp_path)
    assert different(merged, merge_by_peft(llama, adapter, tmp_path / "peft")) == []


def test_methods_share_a_pass(llama, tmp_path):
    adapters = {
        "lora": make_adapter(llama, tmp_path / "lora"),
        "loha": make_method_adapter(llama, tmp_path / "loha", "LOHA"),
        "vera": make_method_adapter(llama, tmp_path / "vera", "VERA"),
    }
    planned = plan_pass(llama, adapters, tmp_path, base_quantization="nf4")
    assert not planned.run().errors
    for name, adapter in adapters.items():
        theirs = merge_by_peft(llama, adapter, tmp_path / "peft" / name, quantization=NF4)
        assert different(read_tensors(planned.output(name)), theirs) == []


def test_the_base_is_not_changed(llama, tmp_path):
    before = {path: path.read_bytes() for path in llama.iterdir()}
    merge(llama, make_method_adapter(llama, tmp_path / "adapter", "IA3"), tmp_path)
    assert {path: path.read_bytes() for path in llama.iterdir()} == before


@pytest.mark.parametrize("method", ["BOFT", "LOHA"])
def test_a_number_that_is_none_fails_its_job_alone(llama, tmp_path, method):
    sound = make_method_adapter(llama, tmp_path / "sound", "LOHA")
    adapter = make_method_adapter(llama, tmp_path / "adapter", method)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    name = min(tensors)
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    planned = plan_pass(llama, {"bad": adapter, "sound": sound}, tmp_path)
    errors = planned.run().errors
    assert list(errors) == ["bad"]
    assert isinstance(errors["bad"], BadInputError)
    assert f"tensor {name}: expected finite numbers" in str(errors["bad"])


@pytest.mark.parametrize("method", sorted(MERGED - SHAPED_BY_VALUES))
def test_a_tensor_that_nobody_wants_is_refused_before_anything_is_read(base_of, tmp_path, method):
    base = base_of(method)
    adapter = make_method_adapter(base, tmp_path / "adapter", method)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    tensors["base_model.model.model.layers.0.surprise"] = torch.zeros(1)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(UnsupportedError, match=r"1 tensors belong to nothing .* first \S+\.surprise"):
        plan_pass(base, {"job": adapter}, tmp_path, accept_unstable=True)


@pytest.mark.parametrize("method", sorted(MERGED - SHAPED_BY_VALUES))
def test_no_tensor_can_be_left_out(base_of, tmp_path, method):
    base = base_of(method)
    adapter = make_method_adapter(base, tmp_path / "adapter", method)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    name = min(tensors)
    tensors.pop(name)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(BadInputError, match=name.rpartition(".")[0]):
        plan_pass(base, {"job": adapter}, tmp_path, accept_unstable=True)


@pytest.mark.parametrize("method", sorted(SHAPED_BY_VALUES))
@pytest.mark.parametrize("change", ["more", "less"])
def test_what_only_the_base_can_tell_is_accounted_for_when_it_is_read(llama, tmp_path, method, change):
    adapter = make_method_adapter(llama, tmp_path / "adapter", method)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    if change == "more":
        tensors["base_model.model.model.layers.0.surprise"] = torch.zeros(1)
    else:
        tensors.pop(min(tensors))
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    (error,) = plan_pass(llama, {"job": adapter}, tmp_path).run().errors.values()
    assert "belong to nothing" in str(error) if change == "more" else "expected tensor" in str(error)


def test_peft_itself_would_leave_it_out_in_silence(llama, tmp_path):
    """The reason for the accounting: whoever merges by hand gets a model that lacks a layer, and a warning at most."""
    adapter = make_method_adapter(llama, tmp_path / "adapter", "LOHA")
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    renamed = {name.replace(".layers.", ".blocks."): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / ADAPTER_WEIGHTS)
    assert different(merge_by_peft(llama, adapter, tmp_path / "peft"), read_tensors(llama)) == []
    with pytest.raises(UnsupportedError, match="32 tensors belong to nothing"):
        plan_pass(llama, {"job": adapter}, tmp_path)
