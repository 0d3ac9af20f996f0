"""Prompts: those of a request, the built-in ones, and the chat template around them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from jobs.errors import BadInputError
from jobs.parity_policy import DEFAULT_PROMPTS
from jobs.request import MergeRequest
from tests.models import build_llama
from workers.parity.prompts import read_prompts


def request(**parity: Any) -> MergeRequest:
    return MergeRequest(base="/b", adapter="/a", destination="/d", parity=parity)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("prompts") / "model", max_position_embeddings=64)


@pytest.fixture(scope="module")
def roomy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = shutil.copytree(model, tmp_path_factory.mktemp("roomy") / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return directory


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def chat(tokenizer: Any, prompt: str) -> list[int]:
    asked = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)


def test_prompts_are_asked_through_the_chat_template(roomy):
    prompts = read_prompts(request(min_positions=1), roomy)
    tokenizer = AutoTokenizer.from_pretrained(roomy)
    assert prompts.texts == DEFAULT_PROMPTS
    assert [list(ids) for ids in prompts.token_ids] == [chat(tokenizer, text) for text in DEFAULT_PROMPTS]
    assert prompts.show(prompts.token_ids[0]) == f"<|user|>{DEFAULT_PROMPTS[0]}<|end|><|assistant|>"
    assert prompts.remarks == ("Prompts were asked through the model's chat template.",)


def test_prompts_of_a_model_without_a_chat_template_are_asked_as_they_are(roomy, tmp_path):
    plain = shutil.copytree(roomy, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    prompts = read_prompts(request(min_positions=1), plain)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert [list(ids) for ids in prompts.token_ids] == [tokenizer(text)["input_ids"] for text in DEFAULT_PROMPTS]
    assert prompts.show(prompts.token_ids[0]) == DEFAULT_PROMPTS[0]
    assert "has no chat template" in prompts.remarks[0]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system message comes first') }}", "a system message comes first"),
        ("{{ messages[0]['content']['of'] + 1 }}", "has no attribute"),
        ("<|user|>{{ messages | length }}", "the message is not in what it makes"),
        ("{% for", "unexpected"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ raise_exception('\x1b[31mred' * 100) }}", "refuses, 1, were asked as they are:  [31mred"),
    ],
)
def test_what_a_chat_template_refuses_is_asked_as_it_is(roomy, tmp_path, template, reason):
    odd = shutil.copytree(roomy, tmp_path / "odd")
    (odd / "chat_template.jinja").write_text(template)
    prompts = read_prompts(request(prompts=["Hello there"], min_positions=1), odd)
    assert list(prompts.token_ids[0]) == AutoTokenizer.from_pretrained(odd)("Hello there")["input_ids"]
    assert reason in prompts.remarks[0]
    assert len(prompts.remarks[0]) < 260


def test_a_chat_template_that_takes_lists_of_parts_gets_one(roomy, tmp_path):
    odd = shutil.copytree(roomy, tmp_path / "odd")
    (odd / "chat_template.jinja").write_text("[{% for part in messages[0].content %}{{ part.text }}{% endfor %}]")
    prompts = read_prompts(request(prompts=["Hello there"], min_positions=1), odd)
    assert prompts.show(prompts.token_ids[0]) == "[Hello there]"


def test_a_chat_template_that_tells_the_day_gives_the_same_prompt_on_every_day(roomy, tmp_path):
    dated = shutil.copytree(roomy, tmp_path / "dated")
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    prompts = read_prompts(request(prompts=["Hello"], min_positions=1), dated)
    assert prompts.show(prompts.token_ids[0]) == "01 Jan 2026: Hello"


def test_a_prompt_with_special_tokens_has_been_rendered_already(roomy):
    prompts = read_prompts(request(prompts=["<|user|>Hi<|end|>", "Hello"], min_positions=1), roomy)
    assert [prompts.show(ids) for ids in prompts.token_ids] == [
        "<|user|>Hi<|end|>",
        "<|user|>Hello<|end|><|assistant|>",
    ]
    assert "special tokens in them, 1," in prompts.remarks[1]


def test_built_in_prompts_follow_until_there_are_enough_positions(roomy):
    own = ["Hello there", "Hello then"]
    tokenizer = AutoTokenizer.from_pretrained(roomy)
    prompts = read_prompts(request(prompts=own), roomy)
    assert prompts.texts[:2] == tuple(own)
    first, second = (chat(tokenizer, prompt) for prompt in own)
    shared = next(n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    assert prompts.nums_shared[:2] == (0, shared)
    nums = [len(ids) - shared for ids, shared in zip(prompts.token_ids, prompts.nums_shared, strict=True)]
    assert sum(nums) >= 256
    assert sum(nums[:-1]) < 256
    assert all(list(ids) == chat(tokenizer, text) for text, ids in zip(prompts.texts, prompts.token_ids, strict=True))
    assert f"The last {len(nums) - 2} prompts are built in" in prompts.remarks[1]


def test_a_prompt_that_is_asked_twice_counts_its_answer_twice(roomy):
    prompts = read_prompts(request(prompts=["Hello", "Hello"], min_positions=1), roomy)
    assert prompts.nums_shared == (0, len(prompts.token_ids[0]) - 1)


def test_a_context_too_short_for_enough_positions_is_told(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30}))
    prompts = read_prompts(request(prompts=["Hello"]), copy)
    assert max(map(len, prompts.token_ids)) + 16 <= 30
    num_positions = sum(map(len, prompts.token_ids)) - sum(prompts.nums_shared)
    assert f"The prompts have {num_positions} positions instead of 256" in prompts.remarks[-1]


def test_special_tokens_are_shown(model):
    assert read_prompts(request(), model).show([1]) == "<|end|>"


def test_drawn_prompts_are_the_same_every_time(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    first, second = read_prompts(request(), copy), read_prompts(request(), copy)
    assert first == second
    assert sum(map(len, first.token_ids)) >= 256
    assert all(0 <= token_id < 512 for ids in first.token_ids for token_id in ids)
    assert first.texts[0] == "token ids " + " ".join(map(str, first.token_ids[0]))


def test_prompt_beyond_the_models_positions_is_refused(model):
    with pytest.raises(BadInputError, match=r"has \d+ tokens; with max_new_tokens 16 .* 64 positions"):
        read_prompts(request(prompts=["xyz " * 40]), model)


def test_default_prompts_that_leave_no_room_are_left_out_and_told(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    tokenizer = AutoTokenizer.from_pretrained(copy)
    fit = [prompt for prompt in DEFAULT_PROMPTS if len(tokenizer(prompt)["input_ids"]) + 30 <= 48]
    assert 0 < len(fit) < len(DEFAULT_PROMPTS)
    prompts = read_prompts(request(max_new_tokens=30, min_positions=1), copy)
    assert list(prompts.texts) == fit
    told = f"{len(DEFAULT_PROMPTS) - len(fit)} of the default prompts are left out: they leave no room"
    assert any(remark.startswith(told) for remark in prompts.remarks)
    with pytest.raises(BadInputError, match="max_new_tokens 48 leave no room for a prompt in the 48 positions"):
        read_prompts(request(max_new_tokens=48), copy)


def test_prompt_without_tokens_is_refused(copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    (copy / "chat_template.jinja").unlink()
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
