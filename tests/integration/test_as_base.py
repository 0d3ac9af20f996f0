"""Releases stored as their base is: untouched bytes, and the library's compression of what PEFT merges."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.request import MergeRequest
from tests import architectures
from tests.contract.places import DirectoryPlace
from tests.killing import (
    FULL,
    adapter_bytes,
    assert_whole,
    files_below,
    finished_in,
    killed,
    merged_again,
    requests_for,
    tensor_bytes,
)
from tests.merges import different, merge_by_peft, read_tensors
from tests.models import build_llama, make_adapter
from tests.stored import twin_of
from tests.stored.again import AGAIN, EVERY, expected_again, release_as_base
from tests.stored.cells import ARCHITECTURES, ON_EXPERTS
from workers.bases.forms.declared import declared_form
from workers.merging.outcomes import PassWork
from workers.worker import MergeWorker


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")

    @functools.cache
    def build(model_type: str) -> Path:
        return architectures.build("decoder", model_type, directory / model_type)

    return build


HERE = {
    "dense": AGAIN,
    "mixture of experts": ["fp8", "compressed-tensors int4 by group"],
    "latent attention": ["fp8 in cut blocks", "compressed-tensors nvfp4"],
}
"""In which each architecture is stored here; `make fidelity` has all."""


@pytest.mark.parametrize(
    ("architecture", "form"), [(architecture, form) for architecture, forms in HERE.items() for form in forms]
)
def test_touched_weights_are_the_librarys_compression_of_the_merge(worker, plain, tmp_path, architecture, form):
    model_type, targets = ARCHITECTURES[architecture]
    base = EVERY[form](plain(model_type), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=targets, rank=2)
    outcome = release_as_base(worker, base, adapter, tmp_path / "release")
    assert outcome.failure is None, outcome.failure
    assert different(read_tensors(tmp_path / "release"), expected_again(base, form, adapter, tmp_path)) == []


@pytest.mark.parametrize("form", ["mxfp4", "mxfp4 with scales apart"])
@pytest.mark.parametrize("options", [{"targets": ["q_proj", "o_proj"]}, ON_EXPERTS], ids=["attention", "experts"])
def test_experts_in_mxfp4(worker, plain, tmp_path, form, options):
    """An adapter of attention alone leaves every expert its bytes."""
    base = EVERY[form](plain("gpt_oss"), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", rank=2, **options)
    outcome = release_as_base(worker, base, adapter, tmp_path / "release")
    assert outcome.failure is None, outcome.failure
    assert different(read_tensors(tmp_path / "release"), expected_again(base, form, adapter, tmp_path)) == []


def in_shards(base):
    """Store a base of one file in one for each layer, and one for the rest."""
    tensors = read_tensors(base)
    (base / "model.safetensors").unlink()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer = name.partition("layers.")[2].partition(".")[0] or "rest"
        files.setdefault(f"layer-{layer}.safetensors", {})[name] = tensor
    for file, held in files.items():
        save_file(held, base / file, metadata={"format": "pt"})
    where = {name: file for file, held in files.items() for name in held}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return base


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A base in FP8 of five shards with a tokenizer, and an adapter."""
    directory = tmp_path_factory.mktemp("sharded")
    plain = build_llama(directory / "plain", num_hidden_layers=4)
    base = in_shards(EVERY["fp8"](plain, directory / "fp8"))
    return base, make_adapter(twin_of(base), directory / "adapter", targets=["q_proj", "down_proj"], rank=2)


@pytest.mark.parametrize("form", ["fp8", "compressed-tensors fp8 by channel", "ModelOpt fp8"])
def test_what_ships_answers_as_base_and_adapter_do(worker, tmp_path, form):
    """By transformers, which reads two of the forms; of ModelOpt, what the shipped codes stand for is run."""
    base = EVERY[form](build_llama(tmp_path / "plain"), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=["q_proj"], std=0.3)
    thresholds = {"max_mean_kl": 0.5, "min_top1_agreement": 0.5, "max_lost_share": 1}
    outcome = release_as_base(worker, base, adapter, tmp_path / "release", parity={**FULL, "thresholds": thresholds})
    assert outcome.failure is None, outcome.failure
    parity = outcome.release.manifest.parity
    assert 0 < parity.mean_kl < parity.adapter_kl
    assert outcome.release.manifest.output == "as_base"
    config = json.loads((tmp_path / "release" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((base / "config.json").read_text())["quantization_config"]
    if form != "ModelOpt fp8":
        read = AutoConfig.from_pretrained(tmp_path / "release")
        read.quantization_config = dict(declared_form(base).loaded_as)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "release", config=read, dtype=torch.bfloat16)
        name = "model.layers.0.self_attn.q_proj.weight"
        merged = merge_by_peft(twin_of(base), adapter, tmp_path / "peft")[name]
        error = (loaded.state_dict()[name].float() - merged.float()).norm() / merged.float().norm()
        assert 0 < error < 0.05


@pytest.mark.parametrize("form", ["fp8 in large blocks", "compressed-tensors int4 by group", "ModelOpt nvfp4"])
def test_a_delta_of_nothing_leaves_the_base(worker, tmp_path, form):
    """Its codes and scales stay; scales that change their dtype keep their values."""
    base = EVERY[form](build_llama(tmp_path / "plain"), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=["q_proj", "down_proj"], std=0)
    outcome = release_as_base(worker, base, adapter, tmp_path / "release")
    assert outcome.failure is None, outcome.failure
    before, found = read_tensors(base), read_tensors(tmp_path / "release")
    assert before.keys() == found.keys()
    assert [name for name in before if not torch.equal(before[name].float(), found[name].float())] == []


def test_a_delta_below_the_steps_of_the_form_fails_by_name(worker, sharded, tmp_path):
    base, _ = sharded
    faint = make_adapter(twin_of(base), tmp_path / "faint", targets=["v_proj"], rank=2, std=1e-3)
    failed = release_as_base(worker, base, faint, tmp_path / "release", parity={"level": "arithmetic"})
    assert failed.failure.failure_class == "parity_failed"
    assert "v_proj.weight: " in failed.failure.message
    assert "of the adapter's delta is left, expected at least 0.5" in failed.failure.message
    assert not (tmp_path / "release").exists()


def test_several_workers_make_the_bytes_of_one(worker, settings, sharded, tmp_path):
    base, adapter = sharded
    thresholds = {"level": "arithmetic", "thresholds": {"min_survival": 0}}
    fields = {"base": str(base), "adapter": str(adapter), "output": "as_base", "parity": thresholds}
    made = {
        place: MergeRequest(id=place, destination=str(tmp_path / place), **fields) for place in ("alone", "together")
    }
    assert worker.run_unit("unit", (made["alone"],)).jobs[0].failure is None
    assert worker.publish("alone").failure is None
    other = MergeWorker(dataclasses.replace(settings, scratch=tmp_path / "other"))
    opened = worker.open_pass("p", "name", (made["together"],))
    assert len(opened.pieces) == 5
    work = PassWork(pass_id="p", name="name", requests=(made["together"],), tickets=opened.tickets)
    merged = []
    for each, piece in zip(itertools.cycle((worker, other)), opened.pieces, strict=False):
        answer = each.merge_shards(work, frozenset(piece.shards))
        assert answer.ended == ()
        merged.append(answer.merged["together"])
    finished = other.finish_pass(work, {"together": tuple(merged)})
    assert finished.jobs[0].failure is None
    assert other.publish("together").failure is None
    other.close()
    for file in (tmp_path / "alone").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "together" / file.name).read_bytes()


@pytest.mark.slow
def test_what_a_killed_worker_has_finished_is_used_again(sharded, tmp_path):
    base, adapter = sharded
    fields = {"output": "as_base", "base_quantization": "stored"}
    fields["parity"] = {"level": "arithmetic", "thresholds": {"min_survival": 0}}
    undisturbed = DirectoryPlace(tmp_path / "undisturbed")
    merged_again(undisturbed, requests_for(sharded, [undisturbed.location], **fields))
    place = DirectoryPlace(tmp_path / "home")
    requests = requests_for(sharded, [place.location], **fields)
    killed(place, requests, "record", after=2)
    (finished,) = finished_in(place).values()
    assert len(finished) == 2
    usage = merged_again(place, requests)
    sizes = tensor_bytes(base)
    assert usage.bytes_read < 3 * (sum(sizes.values()) - sum(sizes[name] for name in finished)) + adapter_bytes(adapter)
    assert_whole(place, files_below(undisturbed.location.path), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, "no dtype beside as_base"),
        ({"max_shard_size": "1GB"}, "none beside output 'as_base'"),
    ],
)
def test_what_a_release_as_its_base_is_cannot_have_is_refused(sharded, tmp_path, fields, message):
    base, adapter = sharded
    with pytest.raises(ValidationError, match=message):
        MergeRequest(base=str(base), adapter=str(adapter), destination=str(tmp_path / "r"), output="as_base", **fields)


def test_what_cannot_be_stored_as_its_base_is_refused(worker, tmp_path):
    plain = build_llama(tmp_path / "plain")
    adapter = make_adapter(plain, tmp_path / "adapter", targets=["q_proj"])
    told = release_as_base(worker, plain, adapter, tmp_path / "release").failure.message
    assert "stored as plain numbers" in told
    awq = EVERY["AWQ"](plain, tmp_path / "awq")
    told = release_as_base(worker, awq, adapter, tmp_path / "release").failure.message
    assert "merged weights are not quantized to that form again; request output: 16bit" in told


def test_requests_that_do_not_say_it_keep_their_names_and_keys():
    fields = {"base": "/b", "adapter": "/a", "destination": "/d", "base_quantization": "stored"}
    plain, stored = MergeRequest(**fields), MergeRequest(**fields, output="as_base")
    assert "output" not in plain.model_dump_json()
    assert MergeRequest.model_validate_json(stored.model_dump_json(by_alias=True)) == stored
    assert plain.id != stored.id
    assert plain.pass_key() == stored.pass_key()
    assert plain.merge_key("0" * 64, "1" * 64) != stored.merge_key("0" * 64, "1" * 64)
