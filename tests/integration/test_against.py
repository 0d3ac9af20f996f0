"""`verify --against`: what external tools made of a release, held against float64 and against what was done to it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cluster.cli import app
from cluster.console.against import against_document
from cluster.settings import Settings
from jobs.locations import LocalPath
from jobs.request import MergeRequest
from tests import architectures
from tests.merges import read_tensors
from tests.models import build_llama, build_qwen2, load_plain, make_adapter
from tests.quantizers import SCHEMES, awq_of, compress_model, fold_scales
from tests.stored import is_linear, twin_of
from tests.stored.compressed import store_compressed
from tests.stored.mxfp4 import store_mxfp4
from workers.against.comparison import Comparison, Limits
from workers.against.gate import verify_against
from workers.against.question import Question
from workers.merging.settings import WorkerSettings
from workers.parity.prompts import read_prompts
from workers.worker import MergeWorker

FOUR_BITS = Limits(max_mean_kl=0.2, min_top1_agreement=0.4)
"""For random models of 64 inputs, whose best tokens are near ties."""
Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
NORM = "model.layers.0.input_layernorm.weight"


class Quiet:
    """Is told how far the gate is, and keeps it to itself."""

    def step(self, words: str) -> None:
        pass

    def expect(self, num_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass


def settings_of(directory: Path) -> WorkerSettings:
    return WorkerSettings(
        cache=directory / "cache",
        scratch=directory / "scratch",
        reports=directory / "reports",
        device="cpu",
        num_threads=2,
    )


def release_of(base: Path, adapter: Path, directory: Path, **fields: object) -> Path:
    """Merge by a worker, and publish."""
    worker = MergeWorker(settings_of(directory.parent))
    request = MergeRequest(
        id=directory.name,
        base=str(base),
        adapter=str(adapter),
        destination=str(directory),
        **{"base_quantization": "none", "parity": {"level": "arithmetic"}, **fields},
    )
    (staged,) = worker.run_unit("unit", (request,)).jobs
    assert staged.failure is None, staged.failure
    published = worker.publish(request.id, None)
    assert published.failure is None, published.failure
    worker.close()
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter and its release."""
    directory = tmp_path_factory.mktemp("against")
    base = build_llama(directory / "base")
    adapter = make_adapter(base, directory / "adapter")
    release_of(base, adapter, directory / "release")
    return directory


@pytest.fixture(scope="module")
def quantized(made):
    """What ModelCompressor makes of the release, by scheme: made when it is first asked for."""

    def make(scheme: str) -> Path:
        place = made / f"by-library-{scheme}"
        return place if place.exists() else compress_model(made / "release", place, scheme)

    return make


@pytest.fixture
def copy(quantized, tmp_path):
    """A copy of the release in INT8, to be broken."""
    return shutil.copytree(quantized("INT8"), tmp_path / "copy")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MERGEFLEET_{name.upper()}", raising=False)
    monkeypatch.setenv("MERGEFLEET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MERGEFLEET_DEVICE", "cpu")


def compare(checkpoint: Path, release: Path, home: Path, *, full: bool = False, **question: object) -> Comparison:
    level = "full" if full else "arithmetic"
    asked = {"limits": Limits(), "level": level, **question}
    places = {"checkpoint": LocalPath(checkpoint), "release": LocalPath(release)}
    return verify_against(Question(**places, **asked), settings_of(home), Quiet())


def change(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put another tensor in the place of one, or take it away."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def numbers_of(directory: Path, scheme: str) -> dict[str, torch.Tensor]:
    """Return the weights that codes stand for, decompressed by the library."""
    stored = read_tensors(directory)
    group = QuantizationScheme.model_validate({"targets": ["Linear"], **SCHEMES[scheme]})
    declared = json.loads((directory / "config.json").read_text())["quantization_config"]
    compressor = BaseCompressor.get_value_from_registry(declared["config_groups"]["group_0"]["format"])
    found = {}
    for module in {name.rpartition(".")[0] for name in stored if name.endswith("weight_scale")}:
        parts = {name.rpartition(".")[2]: each for name, each in stored.items() if name.startswith(f"{module}.")}
        found[f"{module}.weight"] = compressor.decompress(parts, group)["weight"].to(torch.bfloat16)
    return found


def expected(weight: torch.Tensor, release: torch.Tensor, checkpoint: torch.Tensor) -> tuple[float, float]:
    """Return relative error and survival of the delta, in float64."""
    w, a, b = (each.double() for each in (weight, release, checkpoint))
    delta = a - w
    return float((b - a).norm() / a.norm()), float(((b - w) * delta).sum() / (delta * delta).sum())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_release_that_was_quantized_well_passes_with_the_figures_of_float64(made, quantized, tmp_path, scheme):
    """Codes by compressed-tensors' ModelCompressor; numbers by its decompression."""
    limits = Limits() if "8" in scheme else FOUR_BITS
    found = compare(quantized(scheme), made / "release", tmp_path, full=True, limits=limits)
    assert found.failures == ()
    base, release = read_tensors(made / "base"), read_tensors(made / "release")
    numbers = numbers_of(quantized(scheme), scheme)
    assert {each.pair.release for each in found.weights} == numbers.keys()
    assert len(numbers) == 14
    for each in found.weights:
        name = each.pair.release
        error, survival = expected(base[name], release[name], numbers[name])
        assert each.error == pytest.approx(error, rel=1e-9)
        assert each.survival == pytest.approx(survival, rel=1e-9)
    assert not found.changed
    assert found.behaviour is not None
    assert 0 < found.behaviour.mean_kl < found.behaviour.adapter_kl


def test_answers_are_compared_as_transformers_gives_them(made, quantized, tmp_path):
    """KL, NLL and agreement of INT4, from logits of plain transformers on the library's numbers, in float64."""
    found = compare(quantized("INT4"), made / "release", tmp_path, full=True).behaviour
    numbers = shutil.copytree(made / "release", tmp_path / "numbers")
    tensors = load_file(numbers / "model.safetensors") | numbers_of(quantized("INT4"), "INT4")
    save_file(tensors, numbers / "model.safetensors", metadata={"format": "pt"})
    one, other = (load_plain(each, torch.float32) for each in (made / "release", numbers))
    base = load_plain(made / "base", torch.float32)
    request = MergeRequest(base="/b", adapter="/a", destination="/d")
    prompts = read_prompts(request, made / "release")
    kls, effects, likelihoods, agree = [], [], [], []
    with torch.inference_mode():
        for ids, skipped in zip(prompts.token_ids, prompts.nums_shared, strict=True):
            text = one.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=1,
                pad_token_id=0,
            )
            p, q, w = (model(text[:, :-1]).logits[0, skipped:].double().log_softmax(-1) for model in (one, other, base))
            kls.append((p.exp() * (p - q)).sum(-1))
            effects.append((p.exp() * (p - w)).sum(-1))
            likelihoods.append(-q.gather(1, text[0, skipped + 1 :, None]))
            best = margin(one(text[:, :-1]).logits[0, skipped:])
            agree.append((p.argmax(-1) == q.argmax(-1))[best >= 0.25])
    assert found is not None
    assert found.num_positions == len(torch.cat(kls))
    assert found.mean_kl == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3)
    assert found.adapter_kl == pytest.approx(float(torch.cat(effects).mean()), rel=1e-3)
    assert found.checkpoint_nll == pytest.approx(float(torch.cat(likelihoods).mean()), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float(torch.cat(agree).double().mean()), abs=0.02)


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Return how far the best logit is above the next one."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def test_awq_passes(made, tmp_path):
    """Its layout, rounded to the nearest: what ships has the figures of float64."""
    awq = awq_of(made / "release", tmp_path / "awq")
    found = compare(awq, made / "release", tmp_path, full=True, limits=FOUR_BITS)
    assert found.failures == ()
    assert found.form == "AWQ"
    base, release, numbers = (read_tensors(each) for each in (made / "base", made / "release", twin_of(awq)))
    for each in found.weights:
        name = each.pair.release
        error, survival = expected(base[name], release[name], numbers[name])
        assert (each.error, each.survival) == (pytest.approx(error, rel=1e-9), pytest.approx(survival, rel=1e-9))


@pytest.mark.parametrize("store", [awq_of, lambda one, other: compress_model(one, other, "INT4")], ids=["AWQ", "INT4"])
def test_folded_scales_are_told_and_left_to_behaviour(made, tmp_path, store):
    """Norms divided, columns multiplied, rows of up_proj divided: only o_proj is compared weight by weight."""
    checkpoint = store(fold_scales(made / "release", tmp_path / "folded"), tmp_path / "checkpoint")
    limits = Limits(max_mean_kl=0.2, min_top1_agreement=0.3, max_lost_share=1)
    found = compare(checkpoint, made / "release", tmp_path, full=True, limits=limits)
    assert found.failures == ()
    assert {each.pair.release for each in found.weights} == {
        f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)
    }
    assert set(found.foldings.small) == {
        f"model.layers.{layer}.{norm}.weight"
        for layer in (0, 1)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert (
        found.folded["model.layers.0.mlp.down_proj.weight"]
        == "columns by the rows of model.layers.0.mlp.up_proj.weight"
    )
    assert any("folded scales into 4 norms and biases and 12 weights" in note for note in found.notes)
    # Without their models these weights are not known to be anything.
    (failure,) = compare(checkpoint, made / "release", tmp_path).failures
    assert "only behaviour can tell" in failure


def test_a_norm_that_is_changed_alone_is_no_folding(made, quantized, tmp_path):
    """The same change of the norms, and none of the weights that read it."""
    checkpoint = shutil.copytree(quantized("INT4"), tmp_path / "checkpoint")
    folded = load_file(fold_scales(made / "release", tmp_path / "folded") / "model.safetensors")
    change(checkpoint, NORM, folded[NORM])
    found = compare(checkpoint, made / "release", tmp_path)
    assert [failure.partition(":")[0] for failure in found.failures] == [f"tensor {NORM}"]
    assert not found.folded


def test_columns_that_nothing_takes_back_are_told(made, tmp_path):
    """Weights that are scaled for a norm that stayed."""
    folded = fold_scales(made / "release", tmp_path / "folded")
    change(folded, NORM, load_file(made / "release" / "model.safetensors")[NORM])
    found = compare(compress_model(folded, tmp_path / "checkpoint", "INT8"), made / "release", tmp_path)
    named = [failure for failure in found.failures if "its columns are scaled" in failure]
    assert [Q0 in failure for failure in named].count(True) == 1
    assert len(named) == 3


def test_another_adapter_is_found(made, tmp_path):
    """All survivals are near 0, and named; the weights are those of the base, near enough."""
    other = release_of(made / "base", make_adapter(made / "base", tmp_path / "adapter", seed=5), tmp_path / "other")
    checkpoint = compress_model(other, tmp_path / "checkpoint", "FP8")
    found = compare(checkpoint, made / "release", tmp_path, full=True)
    assert found.num_below == 14
    assert len([failure for failure in found.failures if failure.startswith("weight ")]) == 14
    base, release, numbers = read_tensors(made / "base"), read_tensors(made / "release"), numbers_of(checkpoint, "FP8")
    for each in found.survivals:
        name = each.pair.release
        assert each.survival == pytest.approx(expected(base[name], release[name], numbers[name])[1], rel=1e-9)
        assert abs(each.survival) < 0.2
    assert any("mean KL to the release" in failure for failure in found.failures)
    assert any("of what lies between release and base" in failure for failure in found.failures)


def test_the_base_itself_is_found(made, tmp_path):
    """Quantized instead of the release."""
    found = compare(compress_model(made / "base", tmp_path / "checkpoint", "INT8"), made / "release", tmp_path)
    assert found.num_below == 14
    assert max(abs(each.survival or 0) for each in found.survivals) < 0.05


def test_a_weight_of_another_layer_is_found_by_name(made, copy, tmp_path):
    """Codes and scales of q_proj are exchanged between two layers."""
    tensors = load_file(copy / "model.safetensors")
    for part in ("weight", "weight_scale"):
        one, other = (f"model.layers.{layer}.self_attn.q_proj.{part}" for layer in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = compare(copy, made / "release", tmp_path)
    assert sorted(failure.partition(":")[0] for failure in found.failures) == [f"weight {Q0}", f"weight {Q1}"]
    release = read_tensors(made / "release")
    distance = float((release[Q1].double() - release[Q0].double()).norm() / release[Q0].double().norm())
    assert next(each.error for each in found.weights if each.pair.release == Q0) == pytest.approx(distance, rel=0.01)


@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_tensor_in_numbers_that_changed_in_one_element_is_found(made, copy, tmp_path, name):
    tensor = load_file(copy / "model.safetensors")[name].clone()
    tensor.view(-1)[7] += 0.25
    change(copy, name, tensor)
    (failure,) = compare(copy, made / "release", tmp_path).failures
    assert failure.startswith(f"tensor {name}: 1 elements are others")


def test_another_dtype_with_the_same_values_is_told_and_passes(made, copy, tmp_path):
    """AutoAWQ casts what it leaves to float16."""
    change(copy, NORM, load_file(copy / "model.safetensors")[NORM].half())
    found = compare(copy, made / "release", tmp_path)
    assert found.passed
    assert any(NORM in note and "another dtype" in note for note in found.notes)


def test_a_delta_below_half_a_step_fails_by_name_with_its_figure(tmp_path):
    """The base's weights are steps of INT4; what is added rounds away, but for the largest of each group."""
    grid = twin_of(store_compressed(build_llama(tmp_path / "plain"), tmp_path / "int4", "int4 by group"))
    adapter = make_adapter(grid, tmp_path / "adapter", targets=["q_proj"], std=0.004)
    release = release_of(grid, adapter, tmp_path / "release")
    checkpoint = compress_model(release, tmp_path / "checkpoint", "INT4")
    found = compare(checkpoint, release, tmp_path)
    numbers, was, now = numbers_of(checkpoint, "INT4"), read_tensors(grid), read_tensors(release)
    assert [each.pair.release for each in found.survivals] == sorted(
        (Q0, Q1), key=lambda name: expected(was[name], now[name], numbers[name])[1]
    )
    for each in found.survivals:
        name = each.pair.release
        survival = expected(was[name], now[name], numbers[name])[1]
        assert survival < 0.5
        assert each.survival == pytest.approx(survival, rel=1e-9)
        assert any(
            failure.startswith(f"weight {name}: {survival:.3g} of the adapter's delta") for failure in found.failures
        )
    assert len(found.failures) == 2
    assert compare(checkpoint, release, tmp_path, limits=Limits(min_survival=0)).passed


def test_what_is_missing_extra_or_of_another_shape_is_told_by_name(made, copy, tmp_path):
    change(copy, "model.norm.weight", None)
    change(copy, "model.layers.7.stray", torch.zeros(3))
    change(copy, NORM, torch.zeros(32, dtype=torch.bfloat16))
    found = compare(copy, made / "release", tmp_path)
    assert found.failures[:3] == (
        "tensor model.norm.weight: missing",
        f"tensor {NORM}: expected shape [64], found [32]",
        "tensor model.layers.7.stray: the release has none such, nor has its model",
    )
    assert any("nothing was measured" in note for note in found.notes)


def test_fixed_scales_of_activations_are_told_and_pass(made, tmp_path):
    """FP8 static, with an FP8 KV cache."""
    checkpoint = compress_model(made / "release", tmp_path / "checkpoint", "FP8")
    change(checkpoint, "model.layers.0.self_attn.q_proj.input_scale", torch.ones(1))
    change(checkpoint, "model.layers.0.self_attn.k_scale", torch.ones(1))
    found = compare(checkpoint, made / "release", tmp_path)
    assert found.passed
    assert found.accounts.fixed == (
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.q_proj.input_scale",
    )
    assert any("answers here are those of the weights alone" in note for note in found.notes)


def test_a_configuration_of_another_model_is_found(made, copy, tmp_path):
    change_json(
        copy / "config.json",
        eos_token_id=[1, 2],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        pad_token_id=2,
    )
    change_json(copy / "generation_config.json", eos_token_id=[1, 2])
    document = json.loads((copy / "tokenizer.json").read_text())
    first, second = list(document["model"]["vocab"])[50:52]  # after those that were added
    vocabulary = document["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copy / "tokenizer.json").write_text(json.dumps(document))
    found = compare(copy, made / "release", tmp_path)
    told = " | ".join(found.failures)
    for words in (
        "rms_norm_eps",
        "rope",
        "generation stops at other tokens: expected [1], found [1, 2]",
        "2 tokens have other ids",
    ):
        assert words in told
    notes = " | ".join(found.notes)
    assert "files of the tokenizer that are others than the release's: tokenizer.json" in notes
    assert "pad_token_id" in notes


def test_a_tokenizer_that_was_written_anew_passes_and_is_told(made, copy, tmp_path):
    document = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(document | {"padding_side": "left"}))
    found = compare(copy, made / "release", tmp_path)
    assert found.passed
    assert any("tokenizer_config.json" in note for note in found.notes)


@pytest.fixture(scope="module")
def apart(made, tmp_path_factory):
    """The release whose base has moved, and the same in INT8."""
    directory = tmp_path_factory.mktemp("apart")
    moved = shutil.copytree(made / "base", directory / "base")
    release = release_of(moved, made / "adapter", directory / "release")
    shutil.move(moved, directory / "elsewhere")
    return directory, compress_model(release, directory / "checkpoint", "INT8")


def test_without_the_base_errors_alone_are_measured_and_that_is_said(apart, tmp_path):
    directory, checkpoint = apart
    found = compare(checkpoint, directory / "release", tmp_path)
    assert found.passed
    assert found.base is None
    assert found.survivals == ()
    assert len(found.weights) == 14
    assert any("NOT measured, errors only: the base cannot be had" in note for note in found.notes)


def test_the_base_may_be_named(apart, tmp_path):
    directory, checkpoint = apart
    found = compare(checkpoint, directory / "release", tmp_path, base=LocalPath(directory / "elsewhere"))
    assert found.passed
    assert len(found.survivals) == 14


def test_another_base_is_refused(apart, tmp_path):
    directory, checkpoint = apart
    other = build_llama(tmp_path / "other", seed=3)
    code, result = call("verify", checkpoint, "--against", directory / "release", "--base", other, "--json")
    error = json.loads(result.stdout)["error"]
    assert (code, error["class"]) == (2, "bad_input")
    assert "it is another base" in error["message"]


def test_a_release_into_nf4_has_the_delta_to_nf4(tmp_path):
    """W is the base through bitsandbytes: that is what the release's untouched weights are."""
    base = build_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    release = release_of(base, adapter, tmp_path / "release", base_quantization="nf4")
    checkpoint = compress_model(release, tmp_path / "checkpoint", "INT8")
    found = compare(checkpoint, release, tmp_path, full=True)
    assert found.failures == ()
    assert {each.pair.release for each in found.survivals} == {Q0, Q1}
    assert min(each.survival or 0 for each in found.survivals) > 0.9


def test_a_tied_head_that_the_tool_stores_apart_is_compared_with_the_embedding(tmp_path):
    base = build_qwen2(tmp_path / "base")
    release = release_of(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "release")
    checkpoint = compress_model(release, tmp_path / "checkpoint", "INT8")
    embedding = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    change(checkpoint, "lm_head.weight", embedding.clone())
    change_json(checkpoint / "config.json", tie_word_embeddings=False)
    found = compare(checkpoint, release, tmp_path)
    assert found.failures == ()
    assert any("tie_word_embeddings" in note for note in found.notes)
    change(checkpoint, "lm_head.weight", embedding + 1)
    (failure,) = compare(checkpoint, release, tmp_path).failures
    assert "model.embed_tokens.weight" in failure


def test_experts_one_by_one(tmp_path):
    """A mixture of experts, whose files have each expert alone."""
    base = architectures.build("decoder", "qwen3_moe", tmp_path / "base")
    release = release_of(base, make_adapter(base, tmp_path / "adapter", targets=["q_proj"]), tmp_path / "release")
    checkpoint = store_compressed(release, tmp_path / "checkpoint", "int8 by channel")
    found = compare(checkpoint, release, tmp_path)
    assert found.failures == ()
    weights = {name for name, tensor in read_tensors(release).items() if is_linear(name, tensor)}
    assert {each.pair.release for each in found.weights} == weights
    assert any(".experts.3." in name for name in weights)


def test_experts_in_one_tensor(tmp_path):
    """gpt-oss: experts that are what their codes in MXFP4 stand for, and attention in numbers."""
    codes = store_mxfp4(architectures.build("decoder", "gpt_oss", tmp_path / "plain"), tmp_path / "codes")
    base = twin_of(codes)
    release = release_of(base, make_adapter(base, tmp_path / "adapter", targets=["q_proj"]), tmp_path / "release")
    now = load_file(release / "model.safetensors")
    stored = load_file(codes / "model.safetensors")
    whole = stored | {name: tensor for name, tensor in now.items() if name in stored}
    save_file(whole, codes / "model.safetensors", metadata={"format": "pt"})
    found = compare(codes, release, tmp_path)
    assert found.failures == ()
    assert {each.pair.release for each in found.weights} == now.keys() - stored.keys()
    assert {each.error for each in found.weights} == {0.0}
    experts = "model.layers.0.mlp.experts.down_proj_blocks"
    change(codes, experts, whole[experts].roll(1, 0))
    (failure,) = compare(codes, release, tmp_path).failures
    assert failure.startswith("weight model.layers.0.mlp.experts.down_proj:")


def test_numbers_that_are_none_fail_by_name(made, copy, tmp_path):
    """A scale that is NaN, and a weight of zeros."""
    scales = load_file(copy / "model.safetensors")
    change(copy, Q0 + "_scale", scales[Q0 + "_scale"] * math.nan)
    change(copy, Q1, torch.zeros_like(scales[Q1]))
    found = compare(copy, made / "release", tmp_path)
    assert sorted(failure.partition(",")[0] for failure in found.failures) == [
        f"weight {Q0}: inf of its norm away from the release's",
        f"weight {Q1}: 1 of its norm away from the release's",
    ]
    json.dumps(against_document(found), allow_nan=False)


@pytest.mark.parametrize("of", ["fp8 by block", "fp8 by tensor", "int3", "int8 with zero points", "mxfp8"])
def test_rounding_alone_is_no_folding(made, tmp_path, of):
    """Of a release into a base in 16 bits, in the formats that other tests do not have."""
    checkpoint = store_compressed(made / "release", tmp_path / "checkpoint", of)
    found = compare(checkpoint, made / "release", tmp_path)
    assert found.failures == ()
    assert not found.folded


def test_a_release_into_a_base_in_a_form(made, tmp_path):
    """W is what the base's codes stand for; what no adapter touches is no delta."""
    base = store_compressed(made / "base", tmp_path / "base", "int8 by channel")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=["q_proj"])
    release = release_of(base, adapter, tmp_path / "release", base_quantization="stored")
    checkpoint = compress_model(release, tmp_path / "checkpoint", "FP8")
    found = compare(checkpoint, release, tmp_path)
    assert found.failures == ()
    was, now, numbers = read_tensors(twin_of(base)), read_tensors(release), numbers_of(checkpoint, "FP8")
    assert {each.pair.release for each in found.survivals} == {Q0, Q1}
    for each in found.survivals:
        name = each.pair.release
        assert each.survival == pytest.approx(expected(was[name], now[name], numbers[name])[1], rel=1e-9)


@pytest.mark.slow
def test_what_a_dtype_rounds_is_no_delta(tmp_path):
    """A base in float32 and a release in bfloat16: untouched weights differ from W, and have no survival."""
    base = build_llama(tmp_path / "base", dtype=torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    release = release_of(base, adapter, tmp_path / "release", dtype="bfloat16")
    found = compare(compress_model(release, tmp_path / "checkpoint", "INT4"), release, tmp_path)
    assert found.failures == ()
    assert {each.pair.release for each in found.survivals} == {Q0, Q1}


@pytest.mark.s3
def test_places_on_a_store(made, quantized, s3, tmp_path):
    """Release, checkpoint and base, none of them here."""
    client, at = s3.client(), f"s3://{s3.bucket}/{tmp_path.name}"

    def put(directory: Path, name: str) -> str:
        for path in sorted(directory.rglob("*")):
            key = f"{tmp_path.name}/{name}/{path.relative_to(directory)}"
            client.upload_file(str(path), s3.bucket, key)
        return f"{at}/{name}"

    places = [put(made / "base", "base"), put(quantized("INT8"), "int8"), put(made / "release", "release")]
    code, result = call(
        "verify", places[1], "--against", places[2], "--base", places[0], "--parity", "arithmetic", "--json"
    )
    told = json.loads(result.stdout)
    assert (code, told["base"], told["weights"]["num_with_delta"]) == (0, places[0], 14)
    assert sorted((tmp_path / "home" / "scratch").iterdir()) == []


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result


def test_the_command_tells_a_person_and_a_program(made, quantized):
    code, result = call("verify", quantized("INT8"), "--against", made / "release", "--json")
    told = json.loads(result.stdout)
    assert (code, told["passed"], told["failures"]) == (0, True, [])
    assert told["weights"]["num"] == told["weights"]["num_with_delta"] == 14
    assert len(told["weights"]["worst_survival"]) == 5
    assert told["behaviour"]["mean_kl"] < 5e-3
    code, result = call(
        "verify", quantized("INT4"), "--against", made / "release", "--min-survival", "1", "--parity", "arithmetic"
    )
    assert code == 3
    assert "of the adapter's delta is left, expected at least 1" in "".join(result.stdout.splitlines())
    assert "behaviour was NOT measured" in result.stdout


def test_behaviour_has_its_own_limits(made, quantized):
    arguments = ("verify", quantized("INT4"), "--against", made / "release", "--json")
    code, result = call(*arguments)
    told = json.loads(result.stdout)["failures"]
    assert code == 3
    assert any(failure.startswith("mean KL to the release is") for failure in told)
    assert any(failure.startswith("top-1 agreement with the release is") for failure in told)
    code, _ = call(*arguments, "--max-kl", "0.2", "--min-top1", "0.3", "--max-lost-share", "1")
    assert code == 0


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes 8-bit"),
        ({"quant_method": "hqq"}, "HQQ"),
    ],
)
def test_a_form_that_is_not_read_is_refused_by_name(made, copy, declared, words):
    change_json(copy / "config.json", quantization_config=declared)
    code, result = call("verify", copy, "--against", made / "release", "--json")
    error = json.loads(result.stdout)["error"]
    assert (code, error["class"]) == (2, "bad_input")
    assert words in error["message"]
    assert "have the tool save compressed-tensors" in error["message"]


def test_gguf_is_refused_by_name(made, tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    code, result = call("verify", tmp_path / "gguf", "--against", made / "release", "--json")
    assert code == 2
    assert "GGUF" in json.loads(result.stdout)["error"]["message"]


def test_a_release_that_is_not_what_its_manifest_says_is_no_yardstick(made, quantized, tmp_path):
    release = shutil.copytree(made / "release", tmp_path / "release")
    with (release / "config.json").open("a") as file:
        file.write(" ")
    code, result = call("verify", quantized("INT8"), "--against", release, "--json")
    assert code == 2
    assert "is not what its manifest says" in json.loads(result.stdout)["error"]["message"]


def test_a_release_in_a_form_is_no_yardstick(quantized, tmp_path):
    fields = {"output": "int8_w8a16", "base_quantization": "none"}
    base = build_llama(tmp_path / "base", hidden_size=128, intermediate_size=256)
    stored = release_of(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "stored", **fields)
    code, result = call("verify", quantized("INT8"), "--against", stored, "--json")
    assert code == 2
    assert "is stored as int8_w8a16 itself" in json.loads(result.stdout)["error"]["message"]


def test_options_of_the_comparison_need_it(made):
    code, result = call("verify", made / "release", "--max-kl", "0.1", "--json")
    assert code == 2
    assert "--against" in json.loads(result.stdout)["error"]["message"]
    assert call("verify", made / "release", "--json")[0] == 0
