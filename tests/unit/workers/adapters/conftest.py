"""A base and a plain adapter that several files take apart."""

import shutil

import pytest

from tests.models import build_llama, make_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False)


@pytest.fixture(scope="module")
def plain_adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "plain")


@pytest.fixture
def adapter(plain_adapter, tmp_path):
    """A copy of an adapter, to be damaged."""
    return shutil.copytree(plain_adapter, tmp_path / "adapter")
