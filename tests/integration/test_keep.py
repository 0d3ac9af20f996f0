"""Weights that are kept in more bits than the form of their release: which, in what, and what loads it."""

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.locations import LocalPath
from jobs.parity_report import ParityReport
from jobs.release import Manifest
from jobs.request import MergeRequest
from tests import architectures
from tests.contract.places import DirectoryPlace
from tests.killing import FULL, assert_whole, files_below, finished_in, killed, merged_again, requests_for
from tests.merges import different, merge_by_peft, read_tensors
from tests.models import build_llama, make_adapter
from tests.stored import store, twin_of
from tests.stored.compressed import FORMATS, compress, store_compressed
from tests.stored.forms import APART, LINEAR
from tests.stored.kept import FORMS, expected, is_taken, kept, numbers, parts, scheme_of, survival
from tests.stored.mxfp4 import store_mxfp4
from workers.bases.forms.declared import declared_form
from workers.files.checkpoint import read_checkpoint
from workers.merging.outcomes import PassWork
from workers.releases.delivery import verify_release
from workers.unit.checking import check_release
from workers.worker import MergeWorker

SHAPE = {"hidden_size": 128, "intermediate_size": 256}
SMALL = {r"layers\.0\.self_attn\.q_proj": 0.2, r"layers\.1\.mlp\.gate_proj": 0.01}
"""Scalings of an adapter: by the first, half a step of INT4 is out of reach, by the second one of 8 bits, too."""
LOST = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"}
WITH_OTHERS = {
    *(f"model.layers.0.self_attn.{each}_proj.weight" for each in "qkv"),
    *(f"model.layers.1.mlp.{each}_proj.weight" for each in ("gate", "up")),
}
ON_EXPERTS = {"targets": [], "target_parameters": ["layers.1.mlp.experts.down_proj"], "rank": 2}


def combinations(forms):
    """What a request can say of forms; 8 bits of one that has them is refused with it."""
    return [
        (form, keep)
        for form in forms
        for keep in ("16bit", "8bit")
        if keep == "16bit" or not form.startswith(("fp8", "int8"))
    ]


def on_the_grid(base, directory, form="int4_w4a16"):
    """Store a base in a form; its twin in 16 bits has the values that the codes stand for."""
    declared = {
        "quant_method": "compressed-tensors",
        "format": FORMS[form][1],
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme_of(form).model_dump(mode="json", exclude_none=True)},
        "ignore": ["lm_head"],
    }

    def quantize(name, weight):
        return compress(name, weight, FORMS[form][1], scheme_of(form))

    return store(base, directory, quantize, declared, takes=lambda name, weight: is_taken(name, weight, form))


def half_lost(base, directory):
    """Make an adapter whose delta is small beside the steps of a form in two weights, and large in others."""
    targets = ["q_proj", "down_proj", "gate_proj"]
    return make_adapter(base, directory, targets=targets, std=0.2, alpha_pattern=SMALL)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base on the grid of INT4, and an adapter whose delta lies below half a step of it in two weights."""
    directory = tmp_path_factory.mktemp("llama")
    stored = on_the_grid(build_llama(directory / "plain", **SHAPE), directory / "int4")
    return stored, half_lost(twin_of(stored), directory / "adapter")


def base_for(stored, output):
    return stored if output == "as_base" else twin_of(stored)


def release(worker, base, adapter, directory, output, keep, *, least=None, **fields):
    thresholds = {} if least is None else {"thresholds": {"min_survival": least}}
    request = MergeRequest(
        id=directory.name.replace("_", "-"),
        base=str(base),
        adapter=str(adapter),
        destination=str(directory),
        output=output,
        keep=keep,
        **{
            "base_quantization": "stored" if output == "as_base" else "none",
            "parity": {"level": "arithmetic", **thresholds},
            **fields,
        },
    )
    (staged,) = worker.run_unit("unit", (request,)).jobs
    return staged if staged.failure is not None else worker.publish(request.id, None)


def declaration_of(directory):
    return json.loads((directory / "config.json").read_text()).get("quantization_config")


def kept_of(outcome):
    return {each.weight: each.kept_in.value for each in outcome.release.manifest.kept.weights}


def assert_loads(directory, merged, *, dequantize=False):
    """Show that transformers loads a release, and has the numbers that its tensors stand for by their own libraries."""
    plain = directory.with_name(f"{directory.name}-plain")
    plain.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, plain / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(directory)
    if dequantize:
        config.quantization_config = dict(config.quantization_config) | {"dequantize": True}
    loaded, info = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, reference(ids).logits)  # compressed-tensors makes numbers with the first
    found = dict(loaded.state_dict())
    assert different({name: found[name] for name in reference.state_dict()}, dict(reference.state_dict())) == []


def numbers_of(directory, merged, form, kept_in):
    """Return what a release stands for: decompressed by the library, or as PEFT merged it."""
    stored = read_tensors(directory)
    found = {}
    for name, weight in merged.items():
        if not is_taken(name, weight, form) or kept_in.get(name) == "16bit":
            found[name] = stored[name]
        else:
            module = name.removesuffix("weight")
            of_weight = {each: tensor for each, tensor in stored.items() if each.startswith(module)}
            found[name] = numbers(of_weight, "8bit" if name in kept_in else form)
    return found


def test_two_deltas_lie_below_half_a_step_of_int4(llama, tmp_path):
    """What the other tests stand on, by the scales of the base and PEFT's merge."""
    stored, adapter = llama
    before, merged = read_tensors(twin_of(stored)), merge_by_peft(twin_of(stored), adapter, tmp_path / "peft")
    for name in LOST:
        delta = (merged[name].float() - before[name].float()).view(-1, 128).abs().amax(1)
        steps = read_tensors(stored)[name.replace("weight", "weight_scale")].float().view(-1)
        assert (delta > 0).any()
        assert (delta < steps / 2).float().mean() > 0.99


@pytest.mark.parametrize("output", ["int4_w4a16", "as_base"])
def test_what_a_form_would_lose_fails_by_name(worker, llama, tmp_path, output):
    stored, adapter = llama
    outcome = release(worker, base_for(stored, output), adapter, tmp_path / "release", output, None)
    assert "q_proj.weight_packed" in outcome.failure.message
    assert "of the adapter's delta is left, expected at least 0.5" in outcome.failure.message
    assert "request keep: 16bit" in outcome.failure.message
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize("keep", ["16bit", "8bit"])
@pytest.mark.parametrize("output", ["int4_w4a16", "as_base"])
def test_it_is_kept_with_what_servers_fuse_it_with(worker, llama, tmp_path, output, keep):
    """Every tensor by compressed-tensors, of PEFT's merge; and transformers loads it."""
    stored, adapter = llama
    outcome = release(worker, base_for(stored, output), adapter, tmp_path / "release", output, keep)
    assert outcome.failure is None, outcome.failure
    before, merged = read_tensors(twin_of(stored)), merge_by_peft(twin_of(stored), adapter, tmp_path / "peft")
    kept_in = kept(merged, before, "int4_w4a16", keep, 0.5)
    assert kept_of(outcome) == kept_in
    assert kept_in.keys() == WITH_OTHERS
    assert set(kept_in.values()) == {"16bit", keep}
    should_be = expected(merged, "int4_w4a16", kept_in)
    if output == "as_base":  # what nothing touches has the base's bytes
        as_before = {name for name in should_be if _is_untouched(name, before, merged, kept_in)}
        should_be |= {name: tensor for name, tensor in read_tensors(stored).items() if name in as_before}
    assert different(read_tensors(tmp_path / "release"), should_be) == []
    manifest = Manifest.model_validate_json((tmp_path / "release" / "manifest.json").read_bytes())
    for each in manifest.kept.weights:
        left = survival(each.weight, merged, before, "int4_w4a16")
        assert each.survival == (None if left is None else pytest.approx(left, rel=1e-6))
    assert_loads(tmp_path / "release", numbers_of(tmp_path / "release", merged, "int4_w4a16", kept_in))


def _is_untouched(stored, before, merged, kept_in):
    name = f"{stored.rpartition('.')[0]}.weight"
    return name not in kept_in and torch.equal(before[name], merged[name])


def test_what_is_kept_is_told_everywhere(worker, llama, tmp_path):
    stored, adapter = llama
    assert release(worker, twin_of(stored), adapter, tmp_path / "release", "int4_w4a16", "8bit").failure is None
    report = ParityReport.model_validate_json((tmp_path / "release" / "parity.json").read_bytes())
    manifest = Manifest.model_validate_json((tmp_path / "release" / "manifest.json").read_bytes())
    words = "3 of 14 weights kept in 8 bits and 2 in 16 bits"
    assert report.kept == manifest.kept
    assert manifest.kept.words == words
    card, page = ((tmp_path / "release" / name).read_text() for name in ("README.md", "parity.html"))
    for text in (card, page, manifest.notes[0]):
        assert words in text
    for name in WITH_OTHERS:
        assert name in card
        assert name in page
    declared = declaration_of(tmp_path / "release")
    assert {f"{each}.weight" for each in declared["ignore"]} == {
        "lm_head.weight",
        *(name for name in WITH_OTHERS if "layers.1" in name),
    }
    assert {f"{each}.weight" for each in declared["config_groups"]["group_1"]["targets"]} == {
        name for name in WITH_OTHERS if "layers.0" in name
    }


def test_groups_name_their_modules_where_there_are_two(worker, llama, tmp_path):
    """vLLM asks for the class of a fused module before it asks for its parts: no group may take all of class Linear."""
    stored, adapter = llama
    for output in ("int4_w4a16", "as_base"):
        directory = tmp_path / output
        assert release(worker, base_for(stored, output), adapter, directory, output, "8bit").failure is None
        declared = declaration_of(directory)
        targets = [each for group in declared["config_groups"].values() for each in group["targets"]]
        linear = {name.removesuffix(".weight") for name in read_tensors(twin_of(stored)) if "proj" in name}
        assert sorted([*targets, *declared["ignore"]]) == sorted([*linear, "lm_head"])
        assert declared["format"] == "pack-quantized"


@pytest.mark.parametrize(("form", "keep"), combinations(FORMS))
def test_every_form_keeps_what_it_would_lose(worker, tmp_path, form, keep):
    """Of a base on its own grid; two formats in one release are called mixed."""
    base = twin_of(on_the_grid(build_llama(tmp_path / "plain", **SHAPE), tmp_path / "stored", form))
    adapter = half_lost(base, tmp_path / "adapter")
    before, merged = read_tensors(base), merge_by_peft(base, adapter, tmp_path / "peft")
    outcome = release(worker, base, adapter, tmp_path / "release", form, keep)
    assert outcome.failure is None, outcome.failure
    kept_in = kept(merged, before, form, keep, 0.5)
    assert kept_of(outcome) == kept_in
    assert kept_in
    assert different(read_tensors(tmp_path / "release"), expected(merged, form, kept_in)) == []
    formats = {FORMS[form][1], *("pack-quantized" for each in kept_in.values() if each == "8bit")}
    declared = declaration_of(tmp_path / "release")
    assert declared["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")
    # Left in FP8, activations are quantized as they come.
    dequantized = numbers_of(tmp_path / "release", merged, form, kept_in)
    assert_loads(tmp_path / "release", dequantized, dequantize=form.startswith("fp8"))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "keep"), combinations(["fp8_dynamic", "mxfp4", "nvfp4a16"]))
def test_experts_of_a_layer_go_together(worker, tmp_path, form, keep):
    """By a line above what one projection of one layer has left: all projections of all its experts are kept."""
    base = architectures.build("decoder", "qwen3_moe", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", std=0.002, **ON_EXPERTS)
    before, merged = read_tensors(base), merge_by_peft(base, adapter, tmp_path / "peft")
    left = [survival(name, merged, before, form) for name in merged if is_taken(name, merged[name], form)]
    least = min(sorted(each for each in left if each is not None)[1], 0.99)
    outcome = release(worker, base, adapter, tmp_path / "release", form, keep, least=least)
    assert outcome.failure is None, outcome.failure
    kept_in = kept(merged, before, form, keep, least)
    assert kept_of(outcome) == kept_in
    assert kept_in.keys() == {name for name in merged if "layers.1.mlp.experts." in name}
    assert different(read_tensors(tmp_path / "release"), expected(merged, form, kept_in)) == []
    declared = declaration_of(tmp_path / "release")
    named = declared["ignore"] if "16bit" in kept_in.values() else declared["config_groups"]["group_1"]["targets"]
    assert r"re:model\.layers\.1\.mlp\.experts(\.|$)" in named
    specs = {name: spec for name, (_, spec) in read_checkpoint(tmp_path / "release").tensors.items()}
    misread = declared_form(tmp_path / "release").misread(specs, torch.bfloat16)
    assert (misread is None) == (form == "fp8_dynamic")
    if misread is None:
        dequantized = numbers_of(tmp_path / "release", merged, form, kept_in)
        assert_loads(tmp_path / "release", dequantized, dequantize=True)
    else:
        told = Manifest.model_validate_json((tmp_path / "release" / "manifest.json").read_bytes()).notes
        assert any("transformers 5.23 misreads model.layers." in note for note in told)


FP8 = ("fp8", "fp8 in cut blocks", "fp8 with one scale", "fp8 with scales apart")


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("form", FP8)
def test_an_fp8_base_names_what_is_not_converted(worker, tmp_path, form, model_type):
    """By `modules_to_not_convert`; kept are PEFT's numbers, and of what nothing touches the base's, dequantized."""
    moe = model_type != "llama"
    plain = architectures.build("decoder", model_type, tmp_path / "plain") if moe else build_llama(tmp_path / "plain")
    base = {**LINEAR, **APART}[form](plain, tmp_path / "base")
    targets = ON_EXPERTS if moe else {"targets": ["q_proj", "down_proj"]}
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", std=0.0001 if moe else 0.0005, **targets)
    outcome = release(worker, base, adapter, tmp_path / "release", "as_base", "16bit")
    assert outcome.failure is None, outcome.failure
    kept_in = kept_of(outcome)
    assert kept_in
    assert set(kept_in.values()) == {"16bit"}
    merged = merge_by_peft(twin_of(base), adapter, tmp_path / "peft")
    found, stored = read_tensors(tmp_path / "release"), read_tensors(base)
    assert different({name: found[name] for name in kept_in}, {name: merged[name] for name in kept_in}) == []
    assert not [name for name in found if name.removesuffix("_scale_inv") in kept_in and name not in kept_in]
    untouched = {
        name for name in merged if torch.equal(merged[name], read_tensors(twin_of(base))[name]) and name not in kept_in
    }
    assert different({n: found[n] for n in untouched}, {n: stored[n] for n in untouched}) == []
    left_out = declaration_of(tmp_path / "release")["modules_to_not_convert"]
    assert {"lm_head", *(name.removesuffix(".weight") for name in kept_in)} <= set(left_out)
    if moe:
        assert "model.layers.1.mlp.experts" in left_out
    if "cut" not in form:
        twin = {**{name: tensor for name, tensor in found.items() if name in merged}}
        again = declared_form(tmp_path / "release")
        assert again is not None
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.bfloat16)
        state = dict(loaded.state_dict())
        for name in kept_in:
            if name in state:
                assert torch.equal(state[name], twin[name])


@pytest.mark.parametrize("of", FORMATS)
def test_a_base_of_compressed_tensors_ignores_what_is_kept(worker, tmp_path, of):
    """Of every format: what is kept is PEFT's numbers, the rest has the base's bytes, and transformers reads both."""
    base = store_compressed(build_llama(tmp_path / "plain"), tmp_path / "base", of=of)
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=["q_proj", "down_proj"], std=0.0003)
    outcome = release(worker, base, adapter, tmp_path / "release", "as_base", "16bit")
    assert outcome.failure is None, outcome.failure
    merged, before = merge_by_peft(twin_of(base), adapter, tmp_path / "peft"), read_tensors(twin_of(base))
    small = set(kept_of(outcome))
    fused = {name for name in merged if any(f"{each}_proj.weight" in name for each in ("q", "k", "v", "down"))}
    assert small
    assert small <= fused
    found, stored = read_tensors(tmp_path / "release"), read_tensors(base)
    assert different({name: found.pop(name) for name in small}, {name: merged[name] for name in small}) == []
    again = {name for name in merged if name not in small and not torch.equal(merged[name], before[name])}

    def is_of(part, names):
        return f"{part.rpartition('.')[0]}.weight" in names

    assert found.keys() == {part for part in stored if not is_of(part, small)}
    same = {part for part in found if not is_of(part, again)}
    assert different({part: found[part] for part in same}, {part: stored[part] for part in same}) == []
    declared = declaration_of(tmp_path / "release")
    assert set(declared["ignore"]) == {"lm_head", *(name.removesuffix(".weight") for name in small)}
    specs = {name: spec for name, (_, spec) in read_checkpoint(base).tensors.items()}
    if not again and declared_form(base).misread(specs, torch.bfloat16) is None:
        assert_loads(tmp_path / "release", merged, dequantize=True)


@pytest.mark.parametrize("of", ["int4 by group", "int4 with zero points", "nvfp4", "mxfp4"])
def test_a_base_in_4_bits_gets_a_group_of_8(worker, tmp_path, of):
    """What is kept is the library's compression of PEFT's merge, and transformers loads it with the rest."""
    base = store_compressed(build_llama(tmp_path / "plain"), tmp_path / "base", of=of)
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=["q_proj"], std=0.003)
    outcome = release(worker, base, adapter, tmp_path / "release", "as_base", "8bit")
    assert outcome.failure is None, outcome.failure
    merged, kept_in = merge_by_peft(twin_of(base), adapter, tmp_path / "peft"), kept_of(outcome)
    assert set(kept_in.values()) == {"8bit"}
    found, stored = read_tensors(tmp_path / "release"), read_tensors(base)
    in_8_bits = {part: tensor for name in kept_in for part, tensor in parts(name, merged, "8bit").items()}
    assert different({part: found[part] for part in in_8_bits}, in_8_bits) == []
    same = {part for part in found if part not in in_8_bits and "q_proj" not in part}
    assert different({part: found[part] for part in same}, {part: stored[part] for part in same}) == []
    declared = declaration_of(tmp_path / "release")
    assert declared["format"] == ("pack-quantized" if "int4" in of else "mixed-precision")
    # Zero points in words transformers 5.23 takes while it dequantizes alone, with one group of all.
    if "zero points" not in of and all(name in kept_in for name in merged if "q_proj" in name):
        dequantized = {name: numbers(parts(name, merged, "8bit"), "8bit") for name in kept_in}
        assert_loads(tmp_path / "release", merged | dequantized)


def test_experts_of_gpt_oss_are_kept_with_their_layer(worker, tmp_path):
    base = store_mxfp4(architectures.build("decoder", "gpt_oss", tmp_path / "plain"), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", std=0.002, **ON_EXPERTS)
    failed = release(worker, base, adapter, tmp_path / "failed", "as_base", None)
    assert "of the adapter's delta is left" in failed.failure.message
    outcome = release(worker, base, adapter, tmp_path / "release", "as_base", "16bit")
    assert outcome.failure is None, outcome.failure
    names = [f"model.layers.1.mlp.experts.{each}_proj" for each in ("down", "gate_up")]
    assert kept_of(outcome) == dict.fromkeys(names, "16bit")
    merged = merge_by_peft(twin_of(base), adapter, tmp_path / "peft")
    found, stored = read_tensors(tmp_path / "release"), read_tensors(base)
    assert different({name: found[name] for name in names}, {name: merged[name] for name in names}) == []
    others = {name for name in stored if not name.startswith(tuple(names))}
    others |= {name for name in stored if name.endswith("_bias")}
    assert different({n: found[n] for n in others}, {n: stored[n] for n in others}) == []
    assert found.keys() == others | set(names)
    assert declaration_of(tmp_path / "release")["modules_to_not_convert"] == [
        "model.layers.*.self_attn",
        "lm_head",
        "model.layers.1.mlp.experts",
    ]
    assert_loads(tmp_path / "release", merged)


def test_a_release_with_all_weights_in_16_bits_declares_no_form(worker, llama, tmp_path):
    stored, _ = llama
    adapter = make_adapter(twin_of(stored), tmp_path / "adapter", std=0.005)
    for output in ("int4_w4a16", "as_base"):
        directory = tmp_path / output
        thresholds = {"min_survival": 0.9, "max_mean_kl": 5, "min_top1_agreement": 0, "max_lost_share": 1}
        full = {**FULL, "thresholds": thresholds}
        outcome = release(worker, base_for(stored, output), adapter, directory, output, "16bit", parity=full)
        assert outcome.failure is None, outcome.failure
        assert outcome.release.manifest.kept.words == "14 of 14 weights kept in 16 bits"
        assert declaration_of(directory) is None
        merged = merge_by_peft(twin_of(stored), adapter, tmp_path / f"{output}-peft")
        assert different(read_tensors(directory), merged) == []


def test_a_file_of_scales_that_nobody_needs_any_more_is_left_out(worker, tmp_path):
    """All weights of a base are kept whose scales lie in a file of their own."""
    base = APART["fp8 with scales apart"](build_llama(tmp_path / "plain"), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", std=0.0005)
    outcome = release(worker, base, adapter, tmp_path / "release", "as_base", "16bit")
    assert outcome.failure is None, outcome.failure
    assert outcome.release.manifest.kept.words == "14 of 14 weights kept in 16 bits"
    merged = merge_by_peft(twin_of(base), adapter, tmp_path / "peft")
    assert different(read_tensors(tmp_path / "release"), merged) == []
    assert [path.name for path in (tmp_path / "release").glob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    assert declaration_of(tmp_path / "release") is None


@pytest.mark.parametrize("keep", ["16bit", "8bit"])
@pytest.mark.parametrize("output", ["int4_w4a16", "as_base"])
def test_the_release_is_run_checked_and_verified(worker, llama, tmp_path, output, keep):
    """Parity full runs what ships; `mergefleet check` and `verify` have nothing against it."""
    stored, adapter = llama
    thresholds = {"max_mean_kl": 5, "min_top1_agreement": 0, "max_lost_share": 1}
    full = {**FULL, "thresholds": thresholds}
    outcome = release(worker, base_for(stored, output), adapter, tmp_path / "release", output, keep, parity=full)
    assert outcome.failure is None, outcome.failure
    assert outcome.release.manifest.parity.mean_kl > 0
    place = LocalPath(path=tmp_path / "release")
    verify_release(place, tmp_path / "scratch")
    assert [each for each in check_release(place, tmp_path / "scratch") if each.severity.value != "note"] == []


def test_the_other_way_of_a_comparison_keeps_the_same(worker, llama, tmp_path):
    stored, adapter = llama
    thresholds = {"max_mean_kl": 5, "min_top1_agreement": 0, "max_lost_share": 1}
    fields = {"parity": {**FULL, "thresholds": thresholds}, "compare": True}
    outcome = release(worker, twin_of(stored), adapter, tmp_path / "release", "int4_w4a16", "8bit", **fields)
    assert outcome.failure is None, outcome.failure
    report = ParityReport.model_validate_json((tmp_path / "release" / "parity.json").read_bytes())
    assert report.alternative.base_quantization == "nf4"


@pytest.fixture(scope="module", params=["int4_w4a16", "as_base"])
def sharded(request, tmp_path_factory):
    """As `llama`, in a file for each layer and one for the rest; and what is asked for."""
    directory = tmp_path_factory.mktemp("sharded")
    whole = on_the_grid(build_llama(directory / "plain", **SHAPE), directory / "int4")
    adapter = half_lost(twin_of(whole), directory / "adapter")
    base, files = base_for(whole, request.param), {}
    for name, tensor in read_tensors(base).items():
        number = 1 + next((layer for layer in (0, 1) if f"layers.{layer}." in name), 2)
        files.setdefault(f"model-0000{number}-of-00003.safetensors", {})[name] = tensor
    (base / "model.safetensors").unlink()
    for file, held in files.items():
        save_file(held, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = {"output": request.param, "keep": "8bit", "parity": {"level": "arithmetic"}}
    return (base, adapter), fields | {"base_quantization": "stored" if request.param == "as_base" else "none"}


@pytest.mark.slow
def test_a_pass_that_workers_share_makes_the_same_bytes(worker, settings, sharded, tmp_path):
    (base, adapter), fields = sharded
    fields = {"base": str(base), "adapter": str(adapter), **fields}
    made = {
        place: MergeRequest(id=place, destination=str(tmp_path / place), **fields) for place in ("alone", "together")
    }
    assert worker.run_unit("unit", (made["alone"],)).jobs[0].failure is None
    assert worker.publish("alone", None).failure is None
    other = MergeWorker(dataclasses.replace(settings, scratch=tmp_path / "other"))
    opened = worker.open_pass("p", "name", (made["together"],))
    assert len(opened.pieces) == 3
    work = PassWork(pass_id="p", name="name", requests=(made["together"],), tickets=opened.tickets)
    merged = []
    for each, piece in zip(itertools.cycle((worker, other)), reversed(opened.pieces), strict=False):
        answer = each.merge_shards(work, frozenset(piece.shards))
        assert answer.ended == ()
        merged.append(answer.merged["together"])
    finished = other.finish_pass(work, {"together": tuple(merged)})
    assert finished.jobs[0].failure is None
    outcome = other.publish("together", None)
    assert outcome.failure is None
    assert kept_of(outcome).keys() == WITH_OTHERS
    other.close()
    names = [path.name for path in (tmp_path / "alone").iterdir() if path.suffix == ".safetensors"]
    for name in (*names, "config.json", "model.safetensors.index.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


@pytest.mark.slow
def test_what_a_killed_worker_has_finished_is_used_again(sharded, tmp_path):
    sources, fields = sharded
    undisturbed = DirectoryPlace(tmp_path / "undisturbed")
    merged_again(undisturbed, requests_for(sources, [undisturbed.location], **fields))
    place = DirectoryPlace(tmp_path / "home")
    requests = requests_for(sources, [place.location], **fields)
    killed(place, requests, "record", after=2)
    (finished,) = finished_in(place).values()
    assert len(finished) == 2
    merged_again(place, requests)
    assert_whole(place, files_below(undisturbed.location.path), tmp_path)


REFUSED = {
    "ModelOpt fp8": ("16bit", "is not done in FP8 or NVFP4 of ModelOpt"),
    "fp8 with one plain scale": ("16bit", "transformers reads no such base"),
    "FBGEMM fp8": ("16bit", "transformers reads no such base"),
    "fp8": ("8bit", "says nothing for it"),
    "compressed-tensors int8 by channel": ("8bit", "says nothing for it"),
    "compressed-tensors fp8 by channel": ("8bit", "says nothing for it"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_bases_whose_release_nothing_proves_are_refused(worker, tmp_path, form):
    keep, message = REFUSED[form]
    base = LINEAR[form](build_llama(tmp_path / "plain"), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=["q_proj"])
    outcome = release(worker, base, adapter, tmp_path / "release", "as_base", keep)
    assert outcome.failure is not None
    assert message in outcome.failure.message


@pytest.mark.parametrize("keep", ["16bit", "8bit"])
def test_experts_that_transformers_would_not_load_are_refused(worker, tmp_path, keep):
    plain = architectures.build("decoder", "qwen3_moe", tmp_path / "plain")
    base = store_compressed(plain, tmp_path / "base", of="int4 by group")
    on_experts = make_adapter(twin_of(base), tmp_path / "on-experts", **ON_EXPERTS)
    outcome = release(worker, base, on_experts, tmp_path / "release", "as_base", keep)
    assert "is one of the experts of a layer" in outcome.failure.message
    beside = make_adapter(twin_of(base), tmp_path / "beside", targets=["q_proj"], rank=2, std=0.001)
    outcome = release(worker, base, beside, tmp_path / "release", "as_base", keep)
    assert outcome.failure is None, outcome.failure
    assert kept_of(outcome)
