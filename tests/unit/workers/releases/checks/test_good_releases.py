"""Good releases of many architectures and layouts: no rule calls them an error, or warns."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import architectures
from tests.faults import FAULTS
from tests.models import (
    build_bnb_4bit,
    build_llama,
    build_qwen2,
    build_tokenizer,
    make_adapter,
    merge_with_peft,
)
from tests.stored.forms import EXPERTS, LINEAR
from workers.bases.model import quiet_transformers
from workers.releases.checks.checking import check_checkpoint
from workers.releases.checks.rules import Engine, Severity, for_engine

DECODERS = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "deepseek_v3",
    "gpt_oss",
    "gpt2",
    "opt",
    "bloom",
    "falcon",
    "mistral",
    "cohere",
    "cohere2",
    "olmo",
    "olmo2",
    "olmoe",
    "gpt_neox",
    "gpt_bigcode",
    "granite",
    "stablelm",
    "starcoder2",
    "mamba",
    "qwen2_moe",
    "glm4",
    "smollm3",
)
OTHERS = {
    "encoder-decoder": ("t5", "bart", "mbart", "pegasus"),
    "encoder": ("bert", "roberta", "electra", "modernbert"),
    "vision-language": ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "idefics3", "mistral3"),
}
KINDS = [("decoder", name) for name in DECODERS] + [(kind, name) for kind, some in OTHERS.items() for name in some]


def alarms(directory):
    return [each.sentence for each in check_checkpoint(directory) if each.severity is not Severity.NOTE]


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=[name for _, name in KINDS])
def test_what_transformers_saves_is_good(kind, name, tmp_path):
    """Whatever `save_pretrained` of transformers writes of an architecture passes."""
    assert alarms(architectures.build(kind, name, tmp_path / "release")) == []


def save_again(directory, to, **how):
    """Load a checkpoint by transformers, and save it in another layout."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
        model.save_pretrained(to, **how)
    return to


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_may_be_fused_or_one_by_one(name, tmp_path):
    """Both layouts of experts that transformers 5 writes pass; the fused one is noted, for engines that refuse it."""
    single = architectures.build("decoder", name, tmp_path / "single")
    fused = save_again(single, tmp_path / "fused", save_original_format=False)
    assert {tensor for tensor in load_file(fused / "model.safetensors") if tensor.endswith("gate_up_proj")}
    assert alarms(single) == alarms(fused) == []
    assert "tensors.fused-experts" in {each.rule.id for each in check_checkpoint(fused)}


@pytest.mark.parametrize("build", [build_llama, build_qwen2], ids=["untied", "tied"])
@pytest.mark.parametrize("size", ["5GB", "100KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_layouts_of_one_model_are_good(build, size, dtype, tmp_path):
    """Tied or not, in one file or in shards, in every dtype, with tokenizer and chat template."""
    assert alarms(build(tmp_path / "release", max_shard_size=size, dtype=dtype)) == []


def test_merges_are_good(tmp_path):
    """What PEFT merges passes, of a base in one file and of one in shards."""
    for size in ("5GB", "100KB"):
        base = build_llama(tmp_path / f"base-{size}", max_shard_size=size)
        adapter = make_adapter(base, tmp_path / f"adapter-{size}", rank=2)
        assert alarms(merge_with_peft(base, adapter, tmp_path / f"peft-{size}")) == []


@pytest.mark.parametrize("form", LINEAR)
def test_stored_forms_are_good(form, tmp_path):
    """FP8, compressed-tensors, AWQ and ModelOpt with their declarations pass."""
    assert alarms(LINEAR[form](build_llama(tmp_path / "base"), tmp_path / "release")) == []


def test_other_stored_forms_are_good(tmp_path):
    """MXFP4 of gpt-oss, bitsandbytes in 4 bits, simple and double, pass."""
    plain = architectures.build("decoder", "gpt_oss", tmp_path / "plain")
    assert alarms(EXPERTS["mxfp4"](plain, tmp_path / "mxfp4")) == []
    base = build_qwen2(tmp_path / "base")
    for double in (False, True):
        stored = build_bnb_4bit(base, tmp_path / f"bnb-{double}", double_quant=double, max_shard_size="60KB")
        assert alarms(stored) == []


def changed(directory, to, **fields):
    shutil.copytree(directory, to)
    config = json.loads((to / "config.json").read_text())
    config |= fields
    (to / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return to


def test_what_older_versions_write_is_good(tmp_path):
    """torch_dtype, rope_theta and rope_scaling of transformers 4, its other files, and tables that it stored."""
    base = build_llama(tmp_path / "base")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 512
    old = changed(
        base,
        tmp_path / "old",
        dtype=None,
        torch_dtype="bfloat16",
        rope_parameters=None,
        rope_theta=500000.0,
        rope_scaling=scaling,
        transformers_version="4.44.0",
    )
    stored = load_file(old / "model.safetensors")
    for layer in range(2):
        stored[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(stored, old / "model.safetensors", metadata={"format": "pt"})
    tokens = {"<|begin|>": 0, "<|end|>": 1}
    (old / "added_tokens.json").write_text(json.dumps(tokens))
    (old / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (old / "training_args.bin").write_bytes(b"PK")
    assert alarms(old) == []
    ids = {each.rule.id for each in check_checkpoint(old)}
    assert not {rule for rule in ids if rule.startswith(("dtype.", "config."))}


@pytest.mark.parametrize(("old", "new"), [("mrope", "default"), ("su", "longrope")])
def test_scaling_may_be_called_as_it_was_beside_its_new_name(old, new, tmp_path):
    """The same scaling for transformers 4 and 5 is no contradiction, also where transformers has renamed its kind."""
    release = build_llama(tmp_path / "base")
    scaling = {"factor": 1.0, "rope_theta": 500000.0}
    parameters, before = {"rope_type": new, **scaling}, {"type": old, **scaling}
    both = changed(release, tmp_path / "both", rope_parameters=parameters, rope_scaling=before)
    assert "config.rope-differ" not in {each.rule.id for each in check_checkpoint(both)}


def test_files_of_others_beside_a_checkpoint_are_no_fault(tmp_path):
    """The maker's own consolidated file, pickles, GGUF, pages and code that nothing names."""
    base = build_llama(tmp_path / "base", max_shard_size="100KB")
    save_file({"tok_embeddings.weight": torch.zeros(4)}, base / "consolidated.safetensors")
    for name in ("pytorch_model.bin", "model.gguf", "README.md", "own.py", "trainer_state.json", "params.json"):
        (base / name).write_text("{}")
    assert alarms(base) == []


def test_a_cache_of_the_hub_is_good(tmp_path):
    """Snapshots of huggingface_hub are links to blobs."""
    made = build_llama(tmp_path / "made")
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in made.iterdir():
        shutil.copyfile(path, blobs / f"of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/of-{path.name}")
    assert alarms(snapshot) == []


def test_an_engine_asks_for_its_own(tmp_path):
    """What transformers 5 writes is no error to it, and one to transformers 4 where that refuses it."""
    release = build_tokenizer(build_llama(tmp_path / "release", tokenizer=False))
    found = check_checkpoint(release)
    assert "tokenizer.new-class" in {each.rule.id for each in found}
    for engine, errors in ((Engine.TRANSFORMERS_5, set()), (Engine.TRANSFORMERS_4, {"tokenizer.new-class"})):
        of_it = for_engine(found, engine)
        assert {each.rule.id for each in of_it if each.severity is Severity.ERROR} == errors


def test_what_only_saving_refuses_stops_no_engine(tmp_path):
    """transformers 4 loads sampling flags without do_sample, and refuses to write them."""
    release = build_llama(tmp_path / "release")
    (release / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    found = check_checkpoint(release)
    assert "generation.unsavable" in {each.rule.id for each in found}
    errors = [each.rule.id for each in for_engine(found, Engine.TRANSFORMERS_4) if each.severity is Severity.ERROR]
    assert "generation.unsavable" not in errors


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in FAULTS.values()}))
def test_releases_that_are_broken_elsewhere_are_good_before(kind, good):
    """Without their fault, nothing is found in them but notes."""
    assert alarms(good(kind)) == []
