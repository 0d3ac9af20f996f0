"""A release holds all that belongs to its model, wherever the base is from: pulled, and loaded as its users do."""

import io
import itertools
import json
import sys

import pytest
import sentencepiece
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MarianConfig, MarianMTModel, MarianTokenizer

from jobs.locations import HubRepo, LocalPath, S3Prefix
from jobs.request import MergeRequest
from tests.merges import different, merge_by_peft, read_tensors
from tests.models import build_llama, load_plain, make_adapter
from workers.bases.model import quiet_transformers
from workers.releases.delivery import pull_release, verify_release

_CARD = """---
license: other
license_name: own-terms
license_link: LICENSE AGREEMENT.md
language:
- en
- de
pipeline_tag: text-generation
tags:
- poetry
- 4-bit
base_model: org/grandparent
base_model_relation: quantized
model-index:
- name: base
  results: []
---
# The base
"""
_BESIDE = {
    "README.md": _CARD,
    "LICENSE AGREEMENT.md": "terms",
    "ThirdPartyNotices.txt": "thanks",
    "configuration_own.py": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    pass\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
    "modules.json": json.dumps(
        [{"path": path, "type": "sentence_transformers.M"} for path in ("", "1_Pool", "2_Dense")]
    ),
    "1_Pool/config.json": "{}",
    "2_Dense/config.json": '{"in_features": 4}',
    "params.json": "{}",
    "hf_quant_config.json": "{}",
}
_BEHIND = {"params.json", "hf_quant_config.json"}
_numbers = itertools.count()


def build_sentencepiece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["red green blue", "one two three", "north south east west wind"] * 50),
        model_writer=model,
        vocab_size=50,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = build_llama(tmp_path_factory.mktemp("whole") / "base")
    for name, text in _BESIDE.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    save_file({"linear.weight": torch.ones(2, 4)}, directory / "2_Dense" / "model.safetensors")
    (directory / "tokenizer.model").write_bytes(build_sentencepiece())
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter whose trainer saved the fast tokenizer, its vocabulary unchanged."""
    directory = make_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter", targets=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((base / name).read_bytes())
    return directory


def put(directory, kind, servers):
    """Bring a directory to a place of some kind; return it, and a place for a release."""
    number = next(_numbers)
    if kind == "local":
        return LocalPath(directory), LocalPath(directory.parent / f"release-{number}")
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    if kind == "s3":
        server = servers.getfixturevalue("s3")
        place = S3Prefix(server.bucket, f"whole-{number}/base")
        for name, path in files.items():
            server.client().put_object(Bucket=place.bucket, Key=f"{place.prefix}/{name}", Body=path.read_bytes())
        return place, S3Prefix(server.bucket, f"whole-{number}/release")
    place = HubRepo(f"org/whole-{number}")
    servers.getfixturevalue("hub").create(place.repo_id, {name: path.read_bytes() for name, path in files.items()})
    return place, HubRepo(f"org/whole-{number}-release")


def release(worker, base, adapter, destination, target):
    """Merge, publish, verify and pull."""
    request = MergeRequest(
        id="job",
        base=base,
        adapter=str(adapter),
        destination=destination,
        base_quantization="none",
        parity={"level": "arithmetic"},
    )
    [job] = worker.run_unit("unit", (request,)).jobs
    assert job.failure is None, job.failure
    published = worker.publish("job")
    assert published.failure is None, published.failure
    verify_release(destination, target.parent / "scratch")
    pull_release(destination, target)
    return published.release.manifest


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["local", "s3", "hub"])
def test_everything_arrives_and_loads(worker, base, adapter, tmp_path, request, monkeypatch, kind):
    place, destination = put(base, kind, request)
    manifest = release(worker, place, adapter, destination, tmp_path / "pulled")
    pulled = tmp_path / "pulled"
    for name in _BESIDE.keys() - _BEHIND - {"README.md"}:
        assert (pulled / name).read_bytes() == (base / name).read_bytes(), name
    assert (pulled / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert not any((pulled / name).exists() for name in _BEHIND)
    assert torch.equal(load_file(pulled / "2_Dense" / "model.safetensors")["linear.weight"], torch.ones(2, 4))
    assert manifest.notes == ()

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with quiet_transformers():
        own = AutoModelForCausalLM.from_pretrained(pulled, trust_remote_code=True)
    assert type(own).__name__ == "OwnModel"
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    plain = load_plain(pulled)
    assert type(plain).__name__ == "LlamaForCausalLM"
    merged = merge_by_peft(base, adapter, tmp_path / "peft")
    assert different(read_tensors(pulled), merged) == []
    assert AutoTokenizer.from_pretrained(pulled)("north") == AutoTokenizer.from_pretrained(base)("north")

    data = ModelCard.load(pulled / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "own-terms", "LICENSE AGREEMENT.md")
    assert (data.language, data.pipeline_tag) == (["en", "de"], "text-generation")
    assert data.tags == ["poetry", "mergefleet"]
    assert data.base_model == (place.repo_id if kind == "hub" else "org/grandparent")
    assert data.get("base_model_relation") == "finetune"


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")
def test_a_slow_tokenizer_arrives_from_s3(worker, tmp_path, request):
    config = {"vocab_size": 64, "pad_token_id": 63, "decoder_start_token_id": 63, "eos_token_id": 0, "d_model": 16}
    sizes = {f"{side}_{what}": 16 for side in ("encoder", "decoder") for what in ("ffn_dim",)}
    layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    torch.manual_seed(0)
    with quiet_transformers():
        MarianMTModel(MarianConfig(**config, **sizes, **layers, max_position_embeddings=16)).save_pretrained(
            tmp_path / "base"
        )
    pieces = build_sentencepiece()
    for name in ("source.spm", "target.spm"):
        (tmp_path / "base" / name).write_bytes(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    ids = {processor.id_to_piece(number): number + 2 for number in range(3, processor.vocab_size())}
    (tmp_path / "base" / "vocab.json").write_text(json.dumps({"</s>": 0, "<unk>": 1} | ids | {"<pad>": 63}))
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", targets=["q_proj"])
    place, destination = put(tmp_path / "base", "s3", request)
    release(worker, place, adapter, destination, tmp_path / "pulled")
    slow = MarianTokenizer.from_pretrained(tmp_path / "pulled")
    assert slow("north wind").input_ids == MarianTokenizer.from_pretrained(tmp_path / "base")("north wind").input_ids
