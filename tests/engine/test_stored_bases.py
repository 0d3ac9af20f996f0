"""Merges into bases stored in FP8: what the library dequantizes, merged by PEFT, bit for bit."""

import json
import shutil

import pytest
import torch
from transformers import FineGrainedFP8Config

from jobs.errors import UnsupportedError
from tests import architectures
from tests.merges import different, merge, merge_by_peft, plan_pass, read_tensors
from tests.models import build_llama, make_adapter
from tests.stored_bases import store_fp8
from workers.bases.model import load_config, model_class
from workers.merging.sidecars import write_sidecars

ARCHITECTURES = {
    "dense": ("qwen3", ["q_proj", "v_proj", "down_proj"]),
    "mixture of experts": ("qwen3_moe", ["q_proj", "o_proj"]),
    "latent attention": ("deepseek_v3", ["q_a_proj", "kv_b_proj", "o_proj"]),
}

STORED = {"base_quantization": "stored", "parity": {"level": "arithmetic"}}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda name: name.replace(" ", "-"))
def stored(request, tmp_path_factory):
    """A base in FP8 with its twin in 16 bits beside it, and an adapter."""
    model_type, targets = ARCHITECTURES[request.param]
    directory = tmp_path_factory.mktemp("stored")
    plain = architectures.build("decoder", model_type, directory / "plain")
    fp8 = store_fp8(plain, directory / "fp8", block=(16, 16), scale_dtype=torch.float32)
    return fp8, make_adapter(plain, directory / "adapter", targets=targets, rank=2)


def twin_of(fp8):
    return fp8.with_name(f"{fp8.name}-twin")


def test_the_twin_is_what_the_library_dequantizes(stored):
    """But for weights with cut blocks, which transformers misreads (see tests/upstream)."""
    fp8, _ = stored
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=[16, 16])
    model = model_class(load_config(fp8)).from_pretrained(fp8, dtype=torch.bfloat16, quantization_config=config)
    expected = model_class(load_config(twin_of(fp8))).from_pretrained(twin_of(fp8), dtype=torch.bfloat16)
    found = different(dict(model.state_dict()), dict(expected.state_dict()))
    assert [name for name in found if "kv_a_proj_with_mqa" not in name] == []


def test_a_release_is_the_merge_by_peft_of_what_the_library_dequantizes(stored, tmp_path):
    fp8, adapter = stored
    merged = merge(fp8, adapter, tmp_path / "ours", **STORED)
    expected = merge_by_peft(twin_of(fp8), adapter, tmp_path / "peft")
    assert different(merged, expected) == []


def test_what_adapters_are_merged_into_beside_streams(stored, tmp_path):
    """DoRA, which PEFT merges, takes the same weights."""
    fp8, _ = stored
    names = read_tensors(twin_of(fp8))
    target = next(name for name in names if name.endswith("o_proj.weight")).split(".")[-2]
    dora = make_adapter(twin_of(fp8), tmp_path / "dora", targets=[target], rank=2, use_dora=True)
    merged = merge(fp8, dora, tmp_path / "ours", **STORED)
    assert different(merged, merge_by_peft(twin_of(fp8), dora, tmp_path / "peft")) == []


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return build_llama(directory / "plain", tokenizer=False)


@pytest.mark.parametrize(
    ("block", "scale_dtype", "apart"),
    [((128, 128), torch.bfloat16, True), ((48, 80), torch.float32, False), (None, torch.float32, False)],
    ids=["scales apart", "cut blocks", "one scale"],
)
def test_layouts(llama, tmp_path, block, scale_dtype, apart):
    fp8 = store_fp8(llama, tmp_path / "fp8", block=block, scale_dtype=scale_dtype, apart=apart)
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj", "up_proj"])
    merged = merge(fp8, adapter, tmp_path / "ours", **STORED)
    assert different(merged, merge_by_peft(twin_of(fp8), adapter, tmp_path / "peft")) == []


def test_what_the_model_does_not_take_is_dequantized_too(llama, tmp_path):
    """DeepSeek-V3 keeps a layer for its next tokens, which transformers leaves out."""
    source = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    fp8 = store_fp8(source, tmp_path / "fp8")
    adapter = make_adapter(source, tmp_path / "adapter", targets=["q_proj"])
    merged = merge(fp8, adapter, tmp_path / "ours", **STORED)
    twin = read_tensors(twin_of(fp8))
    last = [name for name in twin if f"layers.{config['num_hidden_layers'] - 1}." in name]
    assert last
    assert merged.keys() == twin.keys()
    assert different({name: merged[name] for name in last}, {name: twin[name] for name in last}) == []


def test_a_release_declares_no_form(llama, tmp_path):
    fp8 = store_fp8(llama, tmp_path / "fp8")
    planned = plan_pass(
        fp8,
        {"job": make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])},
        tmp_path / "ours",
        **STORED,
    )
    assert not planned.run().errors
    write_sidecars(planned.plans[0], planned.output("job"))
    assert "quantization_config" not in json.loads((planned.output("job") / "config.json").read_text())
    assert not [name for name in read_tensors(planned.output("job")) if "scale" in name]


def test_other_words_are_refused_with_the_right_one(llama, tmp_path):
    fp8 = store_fp8(llama, tmp_path / "fp8")
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])
    for word in ("none", "nf4"):
        with pytest.raises(UnsupportedError, match=r"stored in FP8.*request base_quantization: stored"):
            plan_pass(fp8, {"job": adapter}, tmp_path / word, base_quantization=word)


def test_plain_bases_are_stored_as_they_are(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])
    merged = merge(llama, adapter, tmp_path / "ours", **STORED)
    assert different(merged, merge_by_peft(llama, adapter, tmp_path / "peft")) == []


def test_a_base_that_transformers_misreads_is_not_run(llama, tmp_path):
    fp8 = store_fp8(llama, tmp_path / "fp8", block=(48, 80))
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])
    with pytest.raises(UnsupportedError, match=r"does not read model.*proj.*cut; request parity level: arithmetic"):
        plan_pass(fp8, {"job": adapter}, tmp_path / "full", **STORED | {"parity": {"level": "full"}})
