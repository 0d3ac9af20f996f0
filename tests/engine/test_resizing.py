"""Adapters of a vocabulary that was resized before the training: merged where they bring all of it, or refused."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from jobs.errors import BadInputError, UnsupportedError
from tests.merges import different, plan_pass, read_tensors
from tests.models import build_llama
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.bases.model import load_config, model_class
from workers.files.checkpoint import read_json
from workers.merging.sidecars import write_sidecars
from workers.parity.inference import quiet_libraries

BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two bases of 512 tokens, by whether embedding and head are tied."""
    directory = tmp_path_factory.mktemp("bases")
    return {
        tied: build_llama(directory / str(tied), num_hidden_layers=1, tie_word_embeddings=tied)
        for tied in (False, True)
    }


def resize(base, num_tokens):
    with quiet_libraries():
        model = model_class(load_config(base)).from_pretrained(base, dtype=torch.bfloat16)
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model


def make(base, directory, num_tokens, *, whole=False, **fields):
    """Train an adapter on a base of another vocabulary.

    Args:
        base: of 512 tokens.
        directory: becomes the adapter.
        num_tokens: that the base is resized to first.
        whole: whether embedding and head are saved with it, as PEFT does where it sees that they were resized.
        fields: of `LoraConfig`.
    """
    torch.manual_seed(3)
    with quiet_libraries():
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | fields)
        peft_model = get_peft_model(resize(base, num_tokens), config)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        peft_model.save_pretrained(directory, save_embedding_layers=whole)
    return directory


def merge_by_peft(base, adapter, num_tokens):
    """Merge over the whole model, resized as the training did."""
    with quiet_libraries():
        merged = PeftModel.from_pretrained(resize(base, num_tokens), adapter).merge_and_unload()
    return merged.state_dict()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_tokens", [516, 500])
@pytest.mark.parametrize(
    ("whole", "fields"),
    [
        (False, {"modules_to_save": BOTH}),
        (True, {}),
        (True, {"modules_to_save": BOTH}),
        (True, {"trainable_token_indices": [3, 499]}),
    ],
    ids=["trained", "saved", "trained-and-saved", "tokens"],
)
def test_the_vocabulary_of_the_adapter_is_that_of_the_release(bases, tmp_path, tied, num_tokens, whole, fields):
    adapter = make(bases[tied], tmp_path / "adapter", num_tokens, whole=whole, **fields)
    planned = plan_pass(bases[tied], {"job": adapter}, tmp_path / "ours")
    assert not planned.run().errors
    ours = read_tensors(planned.output("job"))
    expected = merge_by_peft(bases[tied], adapter, num_tokens)
    assert different(ours, {name: expected[name] for name in ours}) == []
    assert ours["model.embed_tokens.weight"].shape == (num_tokens, 64)
    assert max(check.rounding_excess for check in planned.check()["job"].values()) <= 1
    write_sidecars(planned.plans[0], planned.output("job"))
    assert read_json(planned.output("job") / "config.json")["vocab_size"] == num_tokens
    with quiet_libraries():
        loaded, info = AutoModelForCausalLM.from_pretrained(planned.output("job"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(loaded.lm_head.weight.bfloat16(), expected["lm_head.weight"])


@pytest.mark.parametrize(
    ("tied", "fields", "said"),
    [
        (
            False,
            {"modules_to_save": ["embed_tokens"]},
            r"embed_tokens.* of 516 tokens.* has 512.*bring lm_head\.weight whole",
        ),
        (
            False,
            {"modules_to_save": ["lm_head"]},
            r"lm_head.* of 516 tokens.* has 512.*bring model\.embed_tokens\.weight whole",
        ),
        (True, {"modules_to_save": ["embed_tokens"]}, r"of 516 tokens.* apart; it does not bring lm_head\.weight"),
        (False, {"target_modules": ["embed_tokens"]}, r"lora_embedding_A is of a vocabulary of 516 tokens.* has 512"),
        (True, {"target_modules": ["q_proj", "lm_head"]}, r"lora_B\.weight is of a vocabulary of 516 tokens.* has 512"),
        (False, {"trainable_token_indices": [3, 513]}, r"token 513 was trained, and the vocabulary has 512"),
    ],
    ids=["embedding", "head", "tied", "embedding-lora", "head-lora", "token"],
)
def test_what_brings_a_part_of_it_is_refused_with_both_sizes(bases, tmp_path, tied, fields, said):
    adapter = make(bases[tied], tmp_path / "adapter", 516, **fields)
    with pytest.raises(UnsupportedError) as error:
        plan_pass(bases[tied], {"job": adapter}, tmp_path / "ours")
    assert re.search(said, str(error.value))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, r"516 tokens.* has an entry for each token.*resize the base to 516"),
        ({"modules_to_save": ["shared"]}, r"516 tokens.* apart; it does not bring model\.\w+\.embed_tokens\.weight"),
    ],
    ids=["a bias for each token", "an embedding that is not called"],
)
def test_what_else_has_an_entry_for_each_token_is_named(tmp_path, fields, said):
    """BART adds a buffer to its logits, and resizing makes that longer; its `shared` is one of three embeddings."""
    shape = {"vocab_size": 512, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    shape |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    shape |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    with quiet_libraries():
        BartForConditionalGeneration(BartConfig(**shape)).save_pretrained(tmp_path / "base")
    adapter = make(tmp_path / "base", tmp_path / "adapter", 516, whole=True, **fields)
    with pytest.raises(UnsupportedError, match=said):
        plan_pass(tmp_path / "base", {"job": adapter}, tmp_path / "ours", parity={"level": "arithmetic"})


def test_tokens_of_tied_layers_that_differ_are_refused(bases, tmp_path):
    adapter = make(bases[True], tmp_path / "adapter", 516, whole=True, trainable_token_indices=[3, 513])
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    tensors["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] += 1
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(BadInputError, match=r"lm_head\..* and .*embed_tokens\..*trainable_tokens_delta differ.* ties"):
        plan_pass(bases[True], {"job": adapter}, tmp_path / "ours")
