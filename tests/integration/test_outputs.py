"""Releases stored in a form that the request names: the library's compression of PEFT's merge, and what loads it."""

import functools
import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import generate_gparam
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jobs.output_form import OutputForm
from jobs.parity_report import ParityReport
from jobs.request import MergeRequest
from tests import architectures, merges
from tests.contract.places import DirectoryPlace, S3Place
from tests.killing import FULL, assert_whole, files_below, killed, merged_again, requests_for
from tests.merges import different, merge_by_peft, plan_requests, read_tensors
from tests.models import build_llama, make_adapter
from tests.stored.compressed import compress
from tests.stored.fp8_blocks import store_fp8
from workers.merging.pieces import pieces_of
from workers.merging.plain_base import plain_release_bytes

FORMS = {
    "fp8_dynamic": ("FP8_DYNAMIC", "float-quantized"),
    "fp8_block": ("FP8_BLOCK", "float-quantized"),
    "int8_w8a16": ("W8A16", "pack-quantized"),
    "int4_w4a16": ("W4A16", "pack-quantized"),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized"),
    "nvfp4a16": ("NVFP4A16", "nvfp4-pack-quantized"),
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SHAPE = {"hidden_size": 128, "intermediate_size": 256}
release = functools.partial(merges.release, parity={"level": "arithmetic", "thresholds": {"min_survival": 0}})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    base = build_llama(directory / "base", **SHAPE)
    return base, make_adapter(base, directory / "adapter", targets=["q_proj", "down_proj"], std=0.2)


def compressed(merged, form):
    """Return merged tensors with their projections stored by the library."""
    preset, format_ = FORMS[form]
    weights = preset_name_to_scheme(preset, ["Linear"]).weights.model_dump()
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    found = {}
    for name, weight in merged.items():
        if "proj" not in name or weight.dim() != 2:
            found[name] = weight
            continue
        module = name.split(".")[-2]
        together = next((each for each in FUSED if module in each), (module,))
        siblings = [merged[name.replace(module, each)].float() for each in together]
        shared = None
        if form == "nvfp4a16":
            shared = generate_gparam(min(each.min() for each in siblings), max(each.max() for each in siblings))
        found |= compress(name, weight, format_, scheme, shared)[0]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_projection_is_the_librarys_compression_of_the_merge(worker, llama, tmp_path, form):
    outcome = release(worker, llama, tmp_path / "release", form)
    assert outcome.failure is None, outcome.failure
    expected = compressed(merge_by_peft(*llama, tmp_path / "peft"), form)
    assert different(read_tensors(tmp_path / "release"), expected) == []
    assert outcome.release.manifest.output == form


@pytest.mark.parametrize("form", FORMS)
def test_another_library_loads_it_and_goes_on_with_the_same_tokens(worker, llama, tmp_path, form):
    """transformers by compressed-tensors, against the merged model with the values that the codes stand for."""
    thresholds = {"max_mean_kl": 5, "min_top1_agreement": 0, "max_lost_share": 1, "min_survival": 0}
    outcome = release(worker, llama, tmp_path / "release", form, parity={**FULL, "thresholds": thresholds})
    assert outcome.failure is None, outcome.failure
    assert outcome.release.manifest.parity.mean_kl > 0
    config = AutoConfig.from_pretrained(tmp_path / "release")
    config.quantization_config = dict(config.quantization_config) | {"dequantize": True}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "release", config=config, dtype=torch.bfloat16)
    merge_by_peft(*llama, tmp_path / "peft")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.bfloat16)
    preset, format_ = FORMS[form]
    weights = preset_name_to_scheme(preset, ["Linear"]).weights.model_dump()
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "proj" in name:
                module = name.removesuffix("weight")
                stored = {
                    part.removeprefix(module): tensor
                    for part, tensor in read_tensors(tmp_path / "release").items()
                    if part.startswith(module)
                }
                parameter.copy_(decompressed(stored, format_, scheme))
    assert different(dict(loaded.state_dict()), dict(reference.state_dict())) == []
    tokens = AutoTokenizer.from_pretrained(tmp_path / "release")("The capital of France is", return_tensors="pt")
    ids = tokens["input_ids"]
    one, other = (
        model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0) for model in (loaded, reference)
    )
    assert torch.equal(one, other)


def decompressed(stored, format_, scheme):
    compressor = BaseCompressor.get_value_from_registry(format_)
    return compressor.decompress(stored, scheme)["weight"].to(torch.bfloat16)


def test_what_is_no_projection_stays_and_is_named(worker, llama, tmp_path):
    assert release(worker, llama, tmp_path / "release", "fp8_dynamic").failure is None
    declared = json.loads((tmp_path / "release" / "config.json").read_text())["quantization_config"]
    assert declared["ignore"] == ["lm_head"]
    assert declared["quant_method"] == "compressed-tensors"


HEADS_AND_TOWERS = {
    "a tied head": ("decoder", "bloom", ["query_key_value"]),
    "a tower that files name otherwise": ("vision-language", "gemma3", r".*language_model.*q_proj"),
    "a head inside the language model": ("vision-language", "kosmos-2", r"text_model.*q_proj"),
    "a model that is its own decoder": ("decoder", "mllama", ["q_proj"]),
}


@pytest.mark.parametrize("of", HEADS_AND_TOWERS)
def test_transformers_misses_no_scale_of_what_is_stored_as_numbers(worker, tmp_path, of):
    """Left in its form, as servers run it: what it takes for quantized is what has codes."""
    kind, model_type, targets = HEADS_AND_TOWERS[of]
    base = architectures.build(kind, model_type, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", targets=targets, rank=2)
    outcome = release(worker, (base, adapter), tmp_path / "release", "fp8_dynamic")
    assert outcome.failure is None, outcome.failure
    model, info = architectures.class_of(kind, model_type).from_pretrained(
        tmp_path / "release", output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    quantized = {name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)}
    assert quantized
    assert not [name for name in quantized if "vision" in name or "head" in name]
    found = read_tensors(tmp_path / "release")
    assert len(quantized) == len([name for name in found if name.endswith(".weight_scale")])


@pytest.mark.parametrize(
    ("model_type", "targets"), [("qwen3_moe", ["q_proj"]), ("deepseek_v3", ["q_a_proj"]), ("qwen2_moe", ["q_proj"])]
)
def test_single_experts_are_stored_and_routers_are_not(worker, tmp_path, model_type, targets):
    base = architectures.build("decoder", model_type, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", targets=targets, rank=2)
    outcome = release(worker, (base, adapter), tmp_path / "release", "fp8_dynamic")
    assert outcome.failure is None, outcome.failure
    found = read_tensors(tmp_path / "release")
    experts = [name for name in found if ".experts." in name and name.endswith("proj.weight")]
    assert experts
    assert {found[name].dtype for name in experts} == {torch.float8_e4m3fn}
    routers = [name for name in found if name.endswith(("mlp.gate.weight", "mlp.shared_expert_gate.weight"))]
    assert routers
    assert {found[name].dtype for name in routers} <= {torch.bfloat16, torch.float32}
    declared = json.loads((tmp_path / "release" / "config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in routers} <= set(declared["ignore"])


def test_all_experts_of_a_layer_at_once_are_refused(worker, tmp_path):
    base = architectures.build("decoder", "gpt_oss", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], rank=2)
    outcome = release(worker, (base, adapter), tmp_path / "release", "fp8_dynamic")
    assert "holds all experts of a layer at once" in outcome.failure.message


def test_rows_that_fall_into_no_groups_stay_as_they_are(worker, tmp_path):
    base = build_llama(tmp_path / "base", hidden_size=128, intermediate_size=192)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    assert release(worker, (base, adapter), tmp_path / "release", "int4_w4a16").failure is None
    found = read_tensors(tmp_path / "release")
    assert found["model.layers.0.mlp.down_proj.weight"].dtype is torch.bfloat16
    assert "model.layers.0.mlp.up_proj.weight_packed" in found
    declared = json.loads((tmp_path / "release" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj" in declared["ignore"]


@pytest.mark.slow
def test_the_other_way_of_a_comparison_is_stored_in_the_form_too(worker, llama, tmp_path):
    """What it says is what a release says that is made that way; as numbers it would look better than any."""
    thresholds = {"max_mean_kl": 5, "min_top1_agreement": 0, "max_lost_share": 1, "min_survival": 0}
    asked = {"parity": {**FULL, "thresholds": thresholds}}
    both = release(worker, llama, tmp_path / "both", "int4_w4a16", compare=True, **asked)
    alone = release(worker, llama, tmp_path / "alone", "int4_w4a16", base_quantization="nf4", **asked)
    assert (both.failure, alone.failure) == (None, None)
    alternative, made = (
        ParityReport.model_validate_json((tmp_path / name / "parity.json").read_bytes()) for name in ("both", "alone")
    )
    assert alternative.alternative.base_quantization == "nf4"
    assert alternative.alternative.behaviour == made.behaviour


@pytest.mark.slow
def test_a_resumed_report_says_what_4_bits_changed(tmp_path):
    base = build_llama(tmp_path / "base", max_shard_size="100KB", **SHAPE)
    sources = base, make_adapter(base, tmp_path / "adapter", targets=["q_proj", "down_proj"], std=0.2)
    fields = {"output": "fp8_dynamic", "base_quantization": "nf4"}
    undisturbed, place = DirectoryPlace(tmp_path / "undisturbed"), DirectoryPlace(tmp_path / "home")
    merged_again(undisturbed, requests_for(sources, [undisturbed.location], **fields))
    requests = requests_for(sources, [place.location], **fields)
    killed(place, requests, "record", after=3)
    merged_again(place, requests)
    report = ParityReport.model_validate_json((undisturbed.location.path / "parity.json").read_bytes())
    assert all(check.quantization_error for check in report.tensors if check.requantization_error is not None)
    assert_whole(place, files_below(undisturbed.location.path), tmp_path)


def test_shards_that_take_from_one_base_tensor_are_one_piece(llama, tmp_path):
    base, adapter = llama
    fields = {"base": str(base), "adapter": str(adapter), "destination": str(tmp_path / "r")}
    asked = [
        MergeRequest(id="plain", base_quantization="none", **fields),
        MergeRequest(id="form", base_quantization="none", output="int4_w4a16", max_shard_size="40KB", **fields),
    ]
    (piece,) = pieces_of(plan_requests(asked, tmp_path).plans)
    assert len(piece.shards) > 2


def test_a_disk_has_to_hold_a_release_that_is_run_as_numbers(tmp_path):
    """Where transformers misreads the release alone, as with experts in NVFP4."""
    base = architectures.build("decoder", "qwen3_moe", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], rank=2)
    fields = {"base": str(base), "adapter": str(adapter), "destination": str(tmp_path / "r")}
    sizes = {}
    for output in ("nvfp4a16", "fp8_dynamic"):
        asked = MergeRequest(id=output, base_quantization="none", output=output, **fields)
        (plan,) = plan_requests([asked], tmp_path / output).plans
        sizes[output] = plain_release_bytes(plan)
    weights = sum(tensor.nbytes for tensor in read_tensors(base).values())
    assert sizes == {"nvfp4a16": weights, "fp8_dynamic": 0}


def test_every_word_of_a_request_is_tried_here():
    """Those of GGUF in `test_gguf.py`."""
    assert {form.value for form in OutputForm if not form.is_gguf} == {"16bit", "as_base", *FORMS}


@pytest.mark.s3
@pytest.mark.parametrize("form", ["as_base", "nvfp4a16"])
def test_on_a_store_the_release_is_that_of_a_directory(s3, tmp_path, form):
    base = build_llama(tmp_path / "plain", **SHAPE)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], std=0.2)
    if form == "as_base":
        base = store_fp8(base, tmp_path / "fp8", block=(32, 32))
    fields = {"output": form, "base_quantization": "default"}
    fields["parity"] = {"level": "arithmetic", "thresholds": {"min_survival": 0}}
    here = DirectoryPlace(tmp_path / "here")
    merged_again(here, requests_for((base, adapter), [here.location], **fields))
    place = S3Place(tmp_path / "home", s3, f"outputs/{form.replace('_', '-')}")
    merged_again(place, requests_for((base, adapter), [place.location], **fields))
    assert_whole(place, files_below(here.location.path), tmp_path)
