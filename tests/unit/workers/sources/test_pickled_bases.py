"""Bases whose weights are pickled: the same tensors in safetensors, once, and nothing that a pickle could do."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from jobs.errors import BadInputError, NotFoundError, UnsupportedError
from jobs.locations import LocalPath
from tests.merges import different, merge
from tests.models import build_llama, make_adapter
from workers.sources.fetch import fetch_base


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("llama") / "base")


def pickled(base, directory, num_parts=1):
    shutil.copytree(base, directory)
    tensors = load_file(base / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    for number in range(num_parts):
        part = {name: tensors[name] for name in names[number::num_parts]}
        name = "pytorch_model.bin" if num_parts == 1 else f"pytorch_model-{number + 1:05d}-of-{num_parts:05d}.bin"
        torch.save(part, directory / name)
    return tensors


@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_tensors_are_those_of_the_pickles(llama, tmp_path, num_parts):
    tensors = pickled(llama, tmp_path / "base", num_parts)
    source = fetch_base(LocalPath(tmp_path / "base"), tmp_path / "cache")
    shards = sorted(source.directory.glob("*.safetensors"))
    assert len(shards) == num_parts
    assert different({name: each for shard in shards for name, each in load_file(shard).items()}, tensors) == []
    assert (source.directory / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    if num_parts > 1:
        index = json.loads((source.directory / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
    assert "pytorch_model" in source.notes[0]


def test_it_is_converted_once_and_known_by_its_contents(llama, tmp_path):
    pickled(llama, tmp_path / "base")
    first = fetch_base(LocalPath(tmp_path / "base"), tmp_path / "cache")
    written = (first.directory / "model.safetensors").stat()
    again = fetch_base(LocalPath(tmp_path / "base"), tmp_path / "cache")
    assert again.directory == first.directory
    assert (again.directory / "model.safetensors").stat() == written
    other = fetch_base(LocalPath(tmp_path / "base"), tmp_path / "other-cache")
    assert other.digest == first.digest
    tensors = torch.load(tmp_path / "base" / "pytorch_model.bin", weights_only=True)
    tensors["model.norm.weight"] += 1
    torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    assert fetch_base(LocalPath(tmp_path / "base"), tmp_path / "cache").digest != first.digest


def test_a_merge_is_that_into_the_same_base_in_safetensors(llama, tmp_path):
    pickled(llama, tmp_path / "base")
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])
    fields = {"base_quantization": "none"}
    ours = merge(tmp_path / "base", adapter, tmp_path / "ours", **fields)
    assert different(ours, merge(llama, adapter, tmp_path / "plain", **fields)) == []


def test_safetensors_beside_pickles_count(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"no pickle")
    assert fetch_base(LocalPath(base), tmp_path / "cache").directory == base


class Harm:
    def __reduce__(self):
        return os.system, ("touch /tmp/harm",)


def test_what_is_no_state_dict_of_tensors_is_refused_with_the_advice(llama, tmp_path):
    pickled(llama, tmp_path / "base")
    for content, error in (({"a": Harm()}, UnsupportedError), ([1, 2], BadInputError)):
        torch.save(content, tmp_path / "base" / "pytorch_model.bin")
        with pytest.raises(error, match=r"pytorch_model\.bin: .*load the base with transformers and save it again"):
            fetch_base(LocalPath(tmp_path / "base"), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "unpickled").glob("*/config.json"))


def test_a_missing_part_is_told_by_name(llama, tmp_path):
    pickled(llama, tmp_path / "base", 3)
    (tmp_path / "base" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(NotFoundError, match=r"has no pytorch_model-00002-of-00003\.bin"):
        fetch_base(LocalPath(tmp_path / "base"), tmp_path / "cache")


def test_a_tensor_in_two_parts_is_refused(llama, tmp_path):
    pickled(llama, tmp_path / "base", 2)
    first = torch.load(tmp_path / "base" / "pytorch_model-00001-of-00002.bin", weights_only=True)
    second = torch.load(tmp_path / "base" / "pytorch_model-00002-of-00002.bin", weights_only=True)
    name = next(iter(first))
    torch.save({**second, name: first[name]}, tmp_path / "base" / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(BadInputError, match=f"tensor {name} is in another part"):
        fetch_base(LocalPath(tmp_path / "base"), tmp_path / "cache")


def test_other_pickles_are_refused(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "model.safetensors").rename(base / "model.pt")
    with pytest.raises(UnsupportedError, match=r"model\.pt.*re-save it as safetensors"):
        fetch_base(LocalPath(base), tmp_path / "cache")
