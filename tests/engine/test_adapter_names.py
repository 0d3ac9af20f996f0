"""Adapters whose names are not those of the base's model: what PEFT makes of the same adapter under today's names."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from jobs.errors import MergefleetError
from tests.architectures import build
from tests.computed import computed_ends, is_rounded
from tests.merges import different, merge_by_peft, plan_pass, read_tensors
from tests.models import load_plain
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.adapters.config import ADAPTER_CONFIG
from workers.merging.sidecars import write_sidecars
from workers.parity.inference import quiet_libraries

TEXT = r".*language_model.*\.(q_proj|v_proj)"
EVERYWHERE = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return build("vision-language", "qwen2_5_vl", tmp_path_factory.mktemp("base") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return build("vision-language", "gemma3", tmp_path_factory.mktemp("base") / "gemma3")


def make(base, directory, targets, *, trained=False, **fields):
    """Save an adapter under the names that the model has today; `trained` moves what begins as the base's, too."""
    with quiet_libraries():
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **fields)
        peft_model = get_peft_model(load_plain(base), config)
        for parameter in peft_model.parameters() if trained else ():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        peft_model.save_pretrained(directory)
    return directory


def rewrite(adapter, directory, change, **config):
    """Copy an adapter with other names of tensors and other fields."""
    shutil.copytree(adapter, directory)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, directory / ADAPTER_WEIGHTS)
    fields = json.loads((adapter / ADAPTER_CONFIG).read_text()) | config
    (directory / ADAPTER_CONFIG).write_text(json.dumps(fields))
    return directory


def before_4_52(name):
    return name.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual.")


def gemma_before_4_52(name):
    name = name.replace("model.model.language_model.", "model.language_model.model.")
    return name.replace("base_model.model.lm_head", "base_model.model.language_model.lm_head")


def text_alone(name):
    return name.replace("model.language_model.", "model.")


def merged(base, adapter, directory):
    planned = plan_pass(base, {"job": adapter}, directory)
    assert not planned.run().errors
    return read_tensors(planned.output("job")), planned.plans[0].opened.notes


@pytest.mark.parametrize(
    ("targets", "fields", "old"),
    [
        (EVERYWHERE, {}, {}),
        (
            EVERYWHERE,
            {"alpha_pattern": {"model.language_model.layers.0.self_attn.q_proj": 32}},
            {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 32}},
        ),
        (
            EVERYWHERE,
            {"rank_pattern": {"model.language_model.layers.1.self_attn.v_proj": 2}},
            {"rank_pattern": {"^model.layers.1.self_attn.v_proj": 2}},
        ),
        (
            r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj",
            {},
            {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        ),
        (["q_proj"], {"modules_to_save": ["embed_tokens"]}, {}),
        ([*EVERYWHERE, "embed_tokens", "lm_head"], {}, {}),
        (EVERYWHERE, {"use_dora": True, "bias": "all"}, {}),
    ],
    ids=["plain", "alpha", "rank", "pattern", "embedding", "base-weights", "base-biases"],
)
def test_names_before_a_renaming_are_found_by_the_rules_of_transformers(qwen, tmp_path, targets, fields, old):
    today = make(qwen, tmp_path / "today", targets, **fields)
    adapter = rewrite(today, tmp_path / "old", before_4_52, **old)
    tensors, notes = merged(qwen, adapter, tmp_path / "ours")
    assert different(tensors, merge_by_peft(qwen, today, tmp_path / "peft")) == []
    assert any("modules of the adapter have another name in this base" in note for note in notes)


@pytest.mark.parametrize(
    ("fields", "old"),
    [
        ({"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["language_model.model.embed_tokens"]}),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["language_model.lm_head"]}),
        (
            {"trainable_token_indices": {"embed_tokens": [5, 6]}},
            {"trainable_token_indices": {"language_model.model.embed_tokens": [5, 6]}},
        ),
    ],
    ids=["embedding", "head", "tokens"],
)
def test_tied_weights_under_old_names_are_what_base_and_adapter_compute(gemma, tmp_path, fields, old):
    today = make(gemma, tmp_path / "today", ["q_proj"], trained=True, **fields)
    adapter = rewrite(today, tmp_path / "old", gemma_before_4_52, **old)
    planned = plan_pass(gemma, {"job": adapter}, tmp_path / "ours")
    assert not planned.run().errors
    write_sidecars(planned.plans[0], planned.output("job"))
    loaded, before = load_plain(planned.output("job")), load_plain(gemma)
    for name, exact in computed_ends(gemma, today).items():
        assert is_rounded(loaded.get_parameter(name), exact, before.get_parameter(name))


def test_parameters_that_are_targeted_by_old_names_are_found(tmp_path):
    base = build("vision-language", "qwen3_vl_moe", tmp_path / "base")
    parameters = ["layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"]
    today = make(
        base, tmp_path / "today", [], target_parameters=[f"model.language_model.{name}" for name in parameters]
    )
    old = [f"model.{name}" for name in parameters]
    adapter = rewrite(today, tmp_path / "old", text_alone, target_parameters=old)
    tensors, _ = merged(base, adapter, tmp_path / "ours")
    assert different(tensors, merge_by_peft(base, today, tmp_path / "peft")) == []


def test_an_adapter_of_a_text_model_fits_it_in_a_larger_one(gemma, tmp_path):
    """The vision tower has modules of the same names; they have no adapter, and stay as they are."""
    today = make(gemma, tmp_path / "today", TEXT)
    for number, change in enumerate((text_alone, lambda name: text_alone(name).replace("model.model.", "model."))):
        adapter = rewrite(today, tmp_path / f"text-{number}", change, target_modules=["q_proj", "v_proj"])
        tensors, notes = merged(gemma, adapter, tmp_path / f"ours-{number}")
        assert different(tensors, merge_by_peft(gemma, today, tmp_path / f"peft-{number}")) == []
        assert "the adapter is of the text model alone; modules outside of model.language_model" in notes[-1]


def test_names_of_another_architecture_are_refused(qwen, tmp_path):
    today = make(qwen, tmp_path / "today", EVERYWHERE)
    adapter = rewrite(today, tmp_path / "other", lambda name: name.replace("self_attn", "attention"))
    with pytest.raises(MergefleetError) as error:
        plan_pass(qwen, {"job": adapter}, tmp_path / "ours")
    assert re.search(
        r"has no module model\.language_model\.layers\.0\.attention\.q_proj: .* another architecture", str(error.value)
    )


def test_a_layer_that_the_configuration_leaves_out_is_told(qwen, tmp_path):
    today = make(qwen, tmp_path / "today", EVERYWHERE)
    adapter = rewrite(today, tmp_path / "other", lambda name: name, target_modules=["q_proj", "down_proj"])
    with pytest.raises(MergefleetError) as error:
        plan_pass(qwen, {"job": adapter}, tmp_path / "ours")
    assert "v_proj, but target_modules of the configuration does not name it" in str(error.value)
