"""What transformers knows of a base without its weights, and the bases it does not know."""

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from jobs.errors import BadInputError, NotFoundError, UnsupportedError
from jobs.request import BaseQuantization, QuantizationOptions
from tests.models import build_bnb_4bit, build_llama, build_qwen2, load_plain
from workers.bases.model import (
    StoredQuantization,
    answers_prompts,
    bitsandbytes_config,
    load_config,
    quantized_weights,
    quiet_transformers,
    skeleton,
    stored_quantization,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    return {
        "llama": build_llama(directory / "llama", tokenizer=False),
        "tied llama": build_llama(directory / "tied", tokenizer=False, tie_word_embeddings=True),
        "qwen2": build_qwen2(directory / "qwen2", tokenizer=False),
    }


@pytest.fixture
def change_config(bases, tmp_path):
    """Return a copy of the Llama with some fields of its config changed."""

    def change(**fields):
        shutil.copytree(bases["llama"], tmp_path / "changed", dirs_exist_ok=True)
        path = tmp_path / "changed" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return tmp_path / "changed"

    return change


def converted(base, quantization, options):
    """Return the weights that transformers really converts when it loads the base in 4-bit."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=bitsandbytes_config(quantization, options), dtype="auto", device_map="cpu"
        )
    return [f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


@pytest.mark.parametrize("skip", [None, ("lm_head",), ("q_proj", "model.layers.1"), ("down_proj", "lm_head")])
@pytest.mark.parametrize("name", ["llama", "tied llama", "qwen2"])
def test_the_weights_to_convert_are_those_that_transformers_converts(bases, name, skip):
    options = QuantizationOptions(llm_int8_skip_modules=skip)
    expected = converted(bases[name], BaseQuantization.NF4, options)
    found = quantized_weights(skeleton(bases[name], tied=False), BaseQuantization.NF4, options)
    # Where the head is tied and not skipped, transformers converts it too; the plan refuses that.
    assert found == expected
    assert len(expected) > 5


@pytest.mark.parametrize("name", ["llama", "tied llama", "qwen2"])
def test_a_skeleton_has_every_name_and_shape_and_no_weight(bases, name):
    model = skeleton(bases[name])
    loaded = {name: tuple(parameter.shape) for name, parameter in load_plain(bases[name]).named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == loaded
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_stored_4_bit_format_is_recognized(bases, tmp_path, quant_type, double_quant):
    stored = build_bnb_4bit(bases["llama"], tmp_path / "bnb", quant_type=quant_type, double_quant=double_quant)
    assert stored_quantization(stored) == StoredQuantization(
        quantization=BaseQuantization(quant_type),
        options=QuantizationOptions(bnb_4bit_use_double_quant=double_quant),
    )
    assert skeleton(stored).config.model_type == "llama"


def test_plain_weights_are_stored_in_no_format(bases):
    assert stored_quantization(bases["llama"]) is None


@pytest.mark.parametrize(
    ("quantization_config", "expected", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, UnsupportedError, "'gptq'"),
        ({"quant_method": "aqlm", "bits": 4}, UnsupportedError, "'aqlm'"),
        ({"quant_method": "hqq"}, UnsupportedError, "'hqq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, UnsupportedError, "'bitsandbytes'"),
        ("nf4", UnsupportedError, "'nf4'"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf3"},
            BadInputError,
            "expected nf4 or fp4, found 'nf3'",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "none"},
            BadInputError,
            "expected nf4 or fp4, found 'none'",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": 5},
            BadInputError,
            "expected a list of names, found 5",
        ),
    ],
)
def test_formats_without_a_way_back_are_refused(change_config, quantization_config, expected, message):
    base = change_config(quantization_config=quantization_config)
    with pytest.raises(expected) as error:
        stored_quantization(base)
    assert str(base / "config.json") in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "unheard_of"},
        {"model_type": 7},
        {"model_type": {"llama": None}},
        {"vocab_size": 0, "pad_token_id": 0},
        {"dtype": ["x"], "auto_map": [[1]]},
        {"model_type": "unheard_of", "auto_map": {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "model.M"}},
        {"hidden_size": "sixty-four"},
        {"hidden_size": -4},
        {"hidden_size": 65},
        {"num_attention_heads": 0},
        {"hidden_act": "unheard_of"},
        {"rope_parameters": {"rope_type": "unheard_of"}},
        {"dtype": "float128"},
        {"quantization_config": "nf4"},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_cannot_use_is_refused(change_config, fields):
    base = change_config(**fields)
    with pytest.raises(UnsupportedError) as error:
        skeleton(base)
    assert str(base / "config.json") in str(error.value)
    assert transformers.__version__ in str(error.value)


def test_code_that_comes_with_a_model_is_never_run(change_config, tmp_path):
    base = change_config(
        model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    )
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(UnsupportedError, match="code that comes with a model is never run"):
        skeleton(base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", "[" * 99_999])
def test_a_configuration_that_is_none_is_refused(bases, tmp_path, content):
    shutil.copytree(bases["llama"], tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(content)
    with pytest.raises(BadInputError, match=r"config\.json"):
        load_config(tmp_path / "base")
    with pytest.raises(BadInputError, match=r"config\.json"):
        stored_quantization(tmp_path / "base")


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"config\.json: expected a model configuration"):
        load_config(tmp_path)


def test_the_class_that_saved_a_checkpoint_is_the_one_that_loads_it(change_config):
    assert type(skeleton(change_config(architectures=["LlamaModel"]))).__name__ == "LlamaModel"
    for architectures in (None, [], ["UnheardOf"], ["LlamaConfig"], 7, [7]):
        assert type(skeleton(change_config(architectures=architectures))).__name__ == "LlamaForCausalLM"


def test_what_does_not_continue_text_is_known(change_config):
    assert answers_prompts(skeleton(change_config(architectures=["LlamaForCausalLM"])))
    assert not answers_prompts(skeleton(change_config(architectures=["LlamaModel"])))


def test_transformers_talks_as_before_afterwards():
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_nothing_is_loaded_in_4_bit_but_linear_layers(bases):
    weights = quantized_weights(skeleton(bases["qwen2"], tied=False), BaseQuantization.FP4, QuantizationOptions())
    model = load_plain(bases["qwen2"])
    assert all(isinstance(model.get_submodule(name.removesuffix(".weight")), torch.nn.Linear) for name in weights)
    assert not any("lm_head" in name or "embed" in name for name in weights)
