"""A few rounds of `make wrong-merges`: what is wrong on its way from the adapter to the release is found and named."""

import random

import pytest

from tests.models import build_llama, build_qwen2
from tests.wrong_merges import run_round


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    return {
        "a llama": build_llama(directory / "llama", tokenizer=False),
        "a tied qwen2": build_qwen2(directory / "qwen2", tokenizer=False),
    }


@pytest.mark.parametrize("seed", range(8))
def test_what_is_broken_is_found_and_named(bases, tmp_path, seed):
    assert run_round(tmp_path, bases, random.Random(seed))[1] == ""
