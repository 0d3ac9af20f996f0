import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from jobs.errors import BadInputError
from jobs.request import DEFAULT_PROMPTS, MergeRequest
from tests.models import build_llama
from workers.prompts import read_prompts


def request(**parity: Any) -> MergeRequest:
    return MergeRequest(base="/b", adapter="/a", destination="/d", parity=parity)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("prompts") / "model", max_position_embeddings=64)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def test_token_ids_are_those_of_the_checkpoints_tokenizer(model):
    prompts = read_prompts(request(), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert prompts.texts == DEFAULT_PROMPTS
    assert [list(ids) for ids in prompts.token_ids] == [tokenizer(text)["input_ids"] for text in DEFAULT_PROMPTS]
    assert prompts.show(prompts.token_ids[0]) == DEFAULT_PROMPTS[0]


def test_special_tokens_are_shown(model):
    assert read_prompts(request(), model).show([1]) == "<|end|>"


def test_drawn_prompts_are_the_same_every_time(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    first, second = read_prompts(request(), copy), read_prompts(request(), copy)
    assert first == second
    assert len(first.token_ids) == len(DEFAULT_PROMPTS)
    assert all(0 <= token_id < 512 for ids in first.token_ids for token_id in ids)
    assert first.texts[0] == "token ids " + " ".join(map(str, first.token_ids[0]))


def test_prompt_beyond_the_models_positions_is_refused(model):
    with pytest.raises(BadInputError, match=r"has \d+ tokens; with max_new_tokens 16 .* 64 positions"):
        read_prompts(request(prompts=["xyz " * 40]), model)


def test_prompt_without_tokens_is_refused(copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInputError, match="has no tokens"):
        read_prompts(request(prompts=["fine", "  "]), copy)


def test_held_out_texts_are_read_by_the_same_tokenizer(model):
    prompts = read_prompts(request(texts=["Bees make honey"]), model)
    assert [[*given, *counted] for given, counted in prompts.held_out] == [
        AutoTokenizer.from_pretrained(model)("Bees make honey")["input_ids"]
    ]


def test_what_is_given_of_a_text_does_not_count(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = {"prompt": "What do bees make?\n", "completion": "Honey"}
    [(given, counted)] = read_prompts(request(texts=[text]), model).held_out
    assert list(given) == tokenizer(text["prompt"])["input_ids"]
    assert tokenizer.decode(counted) == "Honey"
    [(given, counted)] = read_prompts(request(texts=["Honey"]), model).held_out
    assert len(given) == 1


def test_a_text_that_begins_as_the_tokenizer_would_begin_it_is_not_begun_twice(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"bos_token": "<|end|>"})
    start = [("<|end|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=start)
    tokenizer.save_pretrained(copy)
    plain, begun = request(texts=["Honey"]), request(texts=["<|end|>Honey"])
    assert read_prompts(plain, copy).held_out == read_prompts(begun, copy).held_out
    assert read_prompts(begun, copy).held_out[0][0] == (tokenizer.bos_token_id,)


def test_a_text_of_one_token_has_no_likelihood(model):
    with pytest.raises(BadInputError, match=r"parity\.texts: 'B' has 1 tokens, expected 2 or more"):
        read_prompts(request(texts=["B"]), model)


def test_texts_of_a_model_without_a_tokenizer_are_refused(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadInputError, match=r"parity\.texts are given"):
        read_prompts(request(texts=["Bees make honey"]), copy)


def test_tokenizer_of_a_larger_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(BadInputError, match="do not belong together"):
        read_prompts(request(), copy)


def test_broken_tokenizer_is_bad_input(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(BadInputError, match="cannot load its tokenizer"):
        read_prompts(request(), copy)
