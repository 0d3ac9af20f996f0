"""The behavioural check against real transformers and PEFT, on models of a few hundred kilobytes."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    MambaConfig,
    MambaForCausalLM,
)

from jobs.errors import BadInputError, CancelledError, NoCapacityError, ParityFailedError
from jobs.parity_policy import DEFAULT_PROMPTS, Thresholds
from jobs.parity_report import BehaviourCheck
from jobs.request import BaseQuantization, MergeRequest
from tests.merges import dequantize_without_kernel
from tests.models import build_bnb_4bit, build_llama, build_qwen2, load_plain, make_adapter, merge_with_peft
from workers.adapters.adapter import open_adapter
from workers.parity.asking import Subject
from workers.parity.behaviour import check_behaviour
from workers.parity.effect import keeps_effect
from workers.parity.loading import Room, load_model

CPU = torch.device("cpu")
LIMITS = Thresholds()


def never() -> None:
    """Nobody cancels."""


def subject(base: Path, adapter: Path, merged: Path, **fields: Any) -> Subject:
    places = {"base": str(base), "adapter": str(adapter), "destination": "/releases/here"}
    parity = {"prompts": DEFAULT_PROMPTS[:3], "max_new_tokens": 8, "min_positions": 1}
    request = MergeRequest(id=merged.name, **places | {"base_quantization": "none", "parity": parity} | fields)
    return Subject(request=request, merged=merged, adapter=open_adapter(adapter), streamed=True)


def check(base: Path, scratch: Path, *subjects: Subject, **options: Any) -> dict[str, Any]:
    found = check_behaviour(base, subjects, CPU, scratch, **{"cancelled": never} | options)
    assert not list(scratch.iterdir())
    return found


def passes(checks: tuple[BehaviourCheck, ...]) -> bool:
    gate = checks[0]
    assert gate.gates
    within = gate.mean_kl <= LIMITS.max_mean_kl and gate.top1_agreement >= LIMITS.min_top1_agreement
    return within and keeps_effect(gate, LIMITS)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("behaviour")


@pytest.fixture(scope="module")
def base(places: Path) -> Path:
    return build_llama(places / "llama", max_shard_size="100KB")


@pytest.fixture(scope="module")
def adapter(places: Path, base: Path) -> Path:
    return make_adapter(base, places / "adapter", rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 4})


@pytest.fixture(scope="module")
def halved(places: Path, adapter: Path) -> Path:
    """The same adapter, with half its scaling."""
    directory = shutil.copytree(adapter, places / "halved")
    config = json.loads((directory / "adapter_config.json").read_text())
    config["lora_alpha"] /= 2
    config["alpha_pattern"] = {name: alpha / 2 for name, alpha in config["alpha_pattern"].items()}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def merged(places: Path, base: Path, adapter: Path) -> Path:
    return merge_with_peft(base, adapter, places / "merged")


@pytest.fixture(scope="module")
def merged_nf4(places: Path, base: Path, adapter: Path) -> Path:
    return merge_with_peft(base, adapter, places / "merged-nf4", quant_type="nf4")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def broken(tmp_path: Path, merged: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], None]], Path]:
    """The correct merge, with its tensors changed by a function."""

    def break_it(change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        directory = shutil.copytree(merged, tmp_path / "broken")
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return break_it


@pytest.mark.parametrize(
    ("quantization", "double_quant"),
    [
        ("none", False),
        ("nf4", False),
        pytest.param("nf4", True, marks=pytest.mark.slow),
        pytest.param("fp4", False, marks=pytest.mark.slow),
    ],
)
def test_correct_merge_passes_by_far(places, base, adapter, scratch, quantization, double_quant):
    name = f"right-{quantization}-{double_quant}"
    quant_type = None if quantization == "none" else quantization
    merged = merge_with_peft(base, adapter, places / name, quant_type=quant_type, double_quant=double_quant)
    options = {"quantization_options": {"bnb_4bit_use_double_quant": True}} if double_quant else {}
    parity = {"min_positions": 1}
    one = subject(base, adapter, merged, base_quantization=quantization, parity=parity, **options)
    gate, other = check(base, scratch, one)[name]
    assert gate.gates
    assert not other.gates
    assert gate.mean_kl < LIMITS.max_mean_kl / 10
    assert gate.top1_agreement == 1
    assert 0 < gate.num_near_ties < gate.num_positions
    assert gate.mean_kl < other.mean_kl / 100
    assert gate.mean_kl < gate.adapter_kl / 100
    assert [prompt.prompt for prompt in gate.prompts] == list(DEFAULT_PROMPTS)
    assert sum(prompt.num_positions for prompt in gate.prompts) == gate.num_positions
    assert max(prompt.max_abs_logit_difference for prompt in gate.prompts) == gate.max_abs_logit_difference
    # Rounding may turn a near tie of a random model; most answers are the same all along.
    assert sum(prompt.reference_text == prompt.merged_text for prompt in gate.prompts) >= 5
    assert quantization in gate.reference or quantization == "none"


def test_halved_scaling_fails(places, base, adapter, halved, scratch):
    wrong = merge_with_peft(base, halved, places / "merged-halved")
    checks = check(base, scratch, subject(base, adapter, wrong))[wrong.name]
    assert not passes(checks)
    assert 0.05 < checks[0].mean_kl / checks[0].adapter_kl < 0.5
    assert any(prompt.reference_text != prompt.merged_text for prompt in checks[0].prompts)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merge_into_the_other_base_fails(base, adapter, merged, merged_nf4, scratch, quantization):
    wrong = merged_nf4 if quantization == "none" else merged
    checks = check(base, scratch, subject(base, adapter, wrong, base_quantization=quantization))[wrong.name]
    assert not passes(checks)
    assert checks[1].mean_kl < LIMITS.max_mean_kl / 10  # which says what went wrong


def test_figures_equal_those_of_peft_alone(base, adapter, merged, scratch):
    prompt, num_new = "Once upon a time, in a village", 5
    held_out = {"prompt": "What do bees make? ", "completion": "Bees make honey"}
    parity = {"prompts": [prompt], "max_new_tokens": num_new, "texts": [held_out], "min_positions": 1}
    gate = check(base, scratch, subject(base, adapter, merged, parity=parity))[merged.name][0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    plain, other = load_plain(base, torch.float32), load_plain(merged, torch.float32)
    with torch.no_grad():
        nll = torch.nn.CrossEntropyLoss()
        without = plain(ids).logits
        reference = PeftModel.from_pretrained(plain, str(adapter)).eval()
        for _ in range(num_new):
            ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], dim=1)
        logits = [model(ids[:, :-1]).logits[0].double() for model in (reference, other)]
    p, q = (x.log_softmax(-1) for x in logits)
    assert gate.num_positions == ids.shape[1] - 1
    assert gate.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    kl_T = (p.exp() * (p - q)).sum(-1)
    assert gate.kl_p999 == pytest.approx(np.quantile(kl_T, 0.999), rel=1e-3)
    delta_p_T = (q.exp() - p.exp()).gather(1, ids[0, 1:, None])[:, 0].numpy()
    assert gate.mean_delta_p == pytest.approx(delta_p_T.mean(), rel=1e-2)
    assert gate.rms_delta_p == pytest.approx(np.sqrt((delta_p_T**2).mean()), rel=1e-3)
    assert gate.delta_p_p001 == pytest.approx(np.quantile(delta_p_T, 0.001), rel=1e-3)
    assert gate.delta_p_p999 == pytest.approx(np.quantile(delta_p_T, 0.999), rel=1e-3)
    assert gate.max_abs_logit_difference == pytest.approx(float((logits[0] - logits[1]).abs().max()), rel=1e-3)
    assert gate.prompts[0].mean_abs_logit_difference == pytest.approx(float((logits[0] - logits[1]).abs().mean()), 1e-3)
    assert gate.reference_nll == pytest.approx(float(nll(logits[0], ids[0, 1:])), rel=1e-5)
    assert gate.merged_nll == pytest.approx(float(nll(logits[1], ids[0, 1:])), rel=1e-5)
    assert gate.prompts[0].reference_text == tokenizer.decode(ids[0, -num_new:])
    with torch.no_grad(), reference.disable_adapter():
        again = reference(ids[:, :-1]).logits[0].double().log_softmax(-1)
    assert without.shape[1] < again.shape[0]
    assert gate.adapter_kl == pytest.approx(float((p.exp() * (p - again)).sum(-1).mean()), rel=1e-3)
    assert gate.lost_share == gate.mean_kl / gate.adapter_kl
    # What was merged by PEFT is what a correct merge loses.
    assert gate.rounding_kl == pytest.approx(gate.mean_kl, rel=1e-3)
    text = tokenizer("".join(held_out.values()), return_tensors="pt")["input_ids"]
    num_given = len(tokenizer(held_out["prompt"])["input_ids"])
    with torch.no_grad():
        logits = [model(text[:, :-1]).logits[0, num_given - 1 :].double() for model in (reference, other)]
        with reference.disable_adapter():
            logits.append(reference(text[:, :-1]).logits[0, num_given - 1 :].double())
    by_peft, by_merged, by_base = (float(nll(each, text[0, num_given:])) for each in logits)
    p, q = (each.log_softmax(-1) for each in logits[:2])
    assert gate.held_out.num_positions == text.shape[1] - num_given
    assert gate.held_out.reference_nll == pytest.approx(by_peft, rel=1e-5)
    assert gate.held_out.merged_nll == pytest.approx(by_merged, rel=1e-5)
    assert gate.held_out.base_nll == pytest.approx(by_base, rel=1e-5)
    assert gate.held_out.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert gate.held_out.num_texts == 1


def scaled(adapter: Path, directory: Path, factor: float) -> Path:
    """The same adapter, with less of an effect."""
    shutil.copytree(adapter, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors = {name: tensor * (factor if "lora_B" in name else 1) for name, tensor in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("dtype", "quantization", "factor"),
    [
        ("bfloat16", "none", 0.1),
        pytest.param("bfloat16", "nf4", 0.1, marks=pytest.mark.slow),
        pytest.param("float16", "none", 0.01, marks=pytest.mark.slow),
        ("float32", "none", 0.003),
    ],
)
def test_a_small_adapter_that_is_dropped_or_halved_fails(tmp_path, scratch, dtype, quantization, factor):
    base = build_llama(tmp_path / "base", dtype=getattr(torch, dtype))
    small = scaled(make_adapter(base, tmp_path / "adapter"), tmp_path / "small", factor)
    quant_type = None if quantization == "none" else quantization
    subjects = []
    for name, kept in (("right", 1.0), ("halved", 0.5), ("dropped", 0.0)):
        merged_from = scaled(small, tmp_path / f"{name}-adapter", kept)
        merged = merge_with_peft(base, merged_from, tmp_path / name, quant_type=quant_type)
        subjects.append(subject(base, small, merged, base_quantization=quantization))
    right, halved, dropped = (checks[0] for checks in check(base, scratch, *subjects).values())
    assert passes((right,))
    assert right.proves_adapter
    # The absolute limits alone would let both out.
    for wrong, share in ((halved, 0.25), (dropped, 1.0)):
        assert wrong.mean_kl < LIMITS.max_mean_kl
        assert wrong.top1_agreement >= LIMITS.min_top1_agreement
        assert wrong.lost_share == pytest.approx(share, rel=0.2)
        assert not passes((wrong,))


@pytest.mark.parametrize("factor", [0.001, 0.0])
def test_an_adapter_below_the_rounding_is_not_proven_by_prompts(base, adapter, tmp_path, scratch, factor):
    tiny = scaled(adapter, tmp_path / "tiny", factor)
    merged = merge_with_peft(base, tiny, tmp_path / "merged")
    gate = check(base, scratch, subject(base, tiny, merged))[merged.name][0]
    assert passes((gate,))
    assert gate.proves_adapter is False
    assert (gate.lost_share is None) == (factor == 0)
    assert gate.remarks[0].startswith("The prompts show no effect of the adapter above the rounding")
    assert "by rounding to bfloat16" in gate.remarks[0]


def test_what_rounding_takes_of_a_small_adapter_is_told(base, adapter, tmp_path, scratch):
    small = scaled(adapter, tmp_path / "small", 0.02)
    merged = merge_with_peft(base, small, tmp_path / "merged")
    gate = check(base, scratch, subject(base, small, merged))[merged.name][0]
    assert passes((gate,))
    assert gate.proves_adapter
    assert re.match(r"Rounding to bfloat16 alone moves the model by \d+% .*dtype: float32", gate.remarks[0])


def test_a_head_left_out_of_a_tied_base_fails(tmp_path, scratch):
    base = build_qwen2(tmp_path / "qwen2")
    adapter = make_adapter(base, tmp_path / "head", targets=["lm_head"], rank=4, std=0.01)
    # Unmerged, base + adapter changes the head alone; PEFT's own merge would change the embeddings, too.
    for streamed in (True, False):
        one = dataclasses.replace(subject(base, adapter, base), streamed=streamed)
        gate = check(base, scratch, one)[base.name][0]
        assert gate.mean_kl < LIMITS.max_mean_kl
        assert gate.rounding_kl < gate.adapter_kl / 100
        assert gate.lost_share == pytest.approx(1)
        assert not passes((gate,))


def rounded_by_transformers(base: Path, adapter: Path, directory: Path, dtype: torch.dtype) -> Path:
    model = PeftModel.from_pretrained(load_plain(base), str(adapter)).merge_and_unload().to(dtype)
    model.save_pretrained(directory)
    for path in (*base.glob("tokenizer*"), *base.glob("*.jinja")):
        shutil.copy(path, directory / path.name)
    return directory


@pytest.mark.parametrize("streamed", [True, False])
def test_rounding_to_another_dtype_is_that_of_every_tensor(tmp_path, scratch, streamed):
    base = build_llama(tmp_path / "base", dtype=torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    merged = rounded_by_transformers(base, adapter, tmp_path / "merged", torch.bfloat16)
    one = dataclasses.replace(subject(base, adapter, merged, dtype="bfloat16"), streamed=streamed)
    gate = check(base, scratch, one)[merged.name][0]
    assert gate.rounding_kl == pytest.approx(gate.mean_kl, rel=1e-2)
    assert passes((gate,))


def merged_in_32_bits(base: Path, adapter: Path, directory: Path) -> Path:
    """The merge of PEFT in float32, each tensor rounded to the dtype that the base stores it in."""
    model = PeftModel.from_pretrained(load_plain(base, torch.float32), str(adapter)).merge_and_unload()
    merged, path = model.state_dict(), shutil.copytree(base, directory) / "model.safetensors"
    rounded = {name: merged[name].to(tensor.dtype) for name, tensor in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("wide", "targets"), [("embed_tokens|lm_head", ["q_proj", "v_proj", "down_proj"]), ("v_proj", ["v_proj"])]
)
def test_each_weight_is_rounded_to_the_dtype_that_it_is_stored_in(tmp_path, scratch, wide, targets):
    path = build_llama(tmp_path / "base") / "model.safetensors"
    tensors = {name: t.float() if re.search(wide, name) else t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", targets=targets, std=0.0005)
    merged = merged_in_32_bits(tmp_path / "base", adapter, tmp_path / "merged")
    for streamed in (True, False):
        one = dataclasses.replace(subject(tmp_path / "base", adapter, merged), streamed=streamed)
        gate = check(tmp_path / "base", scratch, one)[merged.name][0]
        assert passes((gate,))
        assert gate.rounding_kl == pytest.approx(gate.mean_kl, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("beside", [False, True])
def test_what_an_adapter_brings_whole_is_an_effect_and_is_rounded(base, tmp_path, scratch, beside):
    norms = {} if beside else {"modules_to_save": ["input_layernorm", "norm"]}
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], std=0.001, **norms)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    if beside:
        tensors["base_model.model.model.norm.weight"] = torch.ones(64)
    torch.manual_seed(4)
    noisy = {
        name: tensor.float() + torch.randn(tensor.shape) * 1e-3 for name, tensor in tensors.items() if "norm" in name
    }
    save_file(tensors | noisy, path, metadata={"format": "pt"})
    whole = shutil.copytree(base, tmp_path / "base")
    load_plain(base).save_pretrained(whole)  # in one file
    for path in [*whole.glob("*-of-*"), *whole.glob("*.index.json")]:
        path.unlink()
    right = subject(whole, adapter, merged_in_32_bits(whole, adapter, tmp_path / "right"))
    dropped = subject(whole, adapter, shutil.copytree(whole, tmp_path / "dropped"))
    subjects = [dataclasses.replace(each, streamed=False) for each in (right, dropped)]
    right, dropped = (checks[0] for checks in check(whole, scratch, *subjects).values())
    assert passes((right,))
    assert right.rounding_kl == pytest.approx(right.mean_kl, rel=1e-2)
    assert right.adapter_kl > 1e-8
    assert dropped.lost_share == pytest.approx(1, rel=1e-3)


def test_a_model_that_looks_to_the_right_sees_no_padding(tmp_path, scratch):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertLMHeadModel(BertConfig(**shape, intermediate_size=64, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "bert")
    running = load_model(tmp_path / "bert", Room(device=CPU, scratch=scratch))
    texts = [list(range(3, 9)), list(range(20, 50))]
    with torch.inference_mode():
        expected = [model(torch.tensor([text])).logits[0, 1:] for text in texts]
    found = running.logits_together(texts, [len(text) - 1 for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_peft_merges_is_rounded_by_peft(base, tmp_path, scratch):
    adapter = scaled(make_adapter(base, tmp_path / "adapter", use_dora=True), tmp_path / "small", 0.1)
    merged = merge_with_peft(base, adapter, tmp_path / "merged")
    one = dataclasses.replace(subject(base, adapter, merged), streamed=False)
    gate = check(base, scratch, one)[merged.name][0]
    # PEFT computes DoRA's norms in the base's 16 bits.
    assert gate.rounding_kl == pytest.approx(gate.mean_kl, rel=1e-2)
    assert gate.proves_adapter
    assert passes((gate,))


def test_enough_positions_are_compared_by_default(base, adapter, merged, scratch):
    one = subject(base, adapter, merged, parity={"prompts": ["Hello"]})
    gate, other = check(base, scratch, one)[merged.name]
    assert gate.num_positions >= 256
    assert gate.num_positions == other.num_positions == sum(prompt.num_positions for prompt in gate.prompts)
    assert "prompts are built in" in gate.remarks[-1]
    assert (other.rounding_kl, other.proves_adapter, other.remarks) == (None, None, ())
    assert other.lost_share == other.mean_kl / other.adapter_kl


def test_tied_embeddings(places, scratch):
    base = build_qwen2(places / "qwen2")
    adapter = make_adapter(base, places / "qwen2-adapter")
    merged = merge_with_peft(base, adapter, places / "qwen2-merged", quant_type="nf4")
    assert passes(check(base, scratch, subject(base, adapter, merged, base_quantization="nf4"))[merged.name])


@pytest.mark.parametrize(("double_quant", "storage"), [(False, "uint8"), (True, "float32"), (False, "bfloat16")])
def test_base_stored_in_4bit_has_one_reference(places, base, scratch, double_quant, storage):
    name = f"stored-{storage}"
    stored = build_bnb_4bit(base, places / name, double_quant=double_quant, storage=storage)
    adapter = make_adapter(stored, places / f"{name}-adapter")
    merged = merge_with_peft(stored, adapter, places / f"{name}-merged")
    one = subject(stored, adapter, merged, base_quantization="nf4")
    checks = check(stored, scratch, one)[merged.name]
    assert len(checks) == 1
    assert passes(checks)
    assert checks[0].mean_kl < LIMITS.max_mean_kl / 10
    # What was merged by PEFT is what a correct merge loses.
    assert checks[0].rounding_kl == pytest.approx(checks[0].mean_kl, rel=1e-2)
    assert checks[0].proves_adapter
    assert "as stored" in checks[0].reference


def test_many_in_one_pass_are_as_one_at_a_time(places, base, adapter, merged, merged_nf4, scratch):
    second = make_adapter(base, places / "second", rank=2, targets=["q_proj", "v_proj"], rslora=True, seed=5)
    merged_second = merge_with_peft(base, second, places / "merged-second")
    subjects = [
        subject(base, adapter, merged),
        subject(
            base,
            second,
            merged_second,
            parity={"prompts": ["Once", "Once upon a time"], "max_new_tokens": 3, "min_positions": 1},
        ),
        subject(base, adapter, merged_nf4),
    ]
    together = check(base, scratch, *subjects)
    assert list(together) == [merged.name, merged_second.name, merged_nf4.name]
    for one in subjects:
        assert check(base, scratch, one)[one.request.id] == together[one.request.id]


def test_offloaded_to_disk_gives_the_same_figures(base, adapter, merged, scratch, caplog):
    one = subject(base, adapter, merged)
    in_memory = check(base, scratch, one)[merged.name]
    # Too little for embeddings and head: everything stays in the checkpoint's own files.
    offloaded = check(base, scratch, one, host_bytes=300_000)[merged.name]
    told = "There is no comparison for information: the base in nf4 + adapter has no room here."
    assert offloaded == (in_memory[0].model_copy(update={"remarks": (*in_memory[0].remarks, told)}),)
    assert [record.message for record in caplog.records] == ["no comparison for information"]


def test_a_base_that_does_not_run_in_4bit_is_compared_in_its_own_weights(tmp_path, scratch):
    # transformers multiplies by a weight of a Mamba itself, which in 4 bits is codes.
    config = MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8)
    torch.manual_seed(0)
    MambaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", targets=["in_proj", "x_proj"])
    merged = merge_with_peft(tmp_path / "base", adapter, tmp_path / "merged")
    parity = {"min_positions": 1, "max_new_tokens": 1}
    checks = check(tmp_path / "base", scratch, subject(tmp_path / "base", adapter, merged, parity=parity))[merged.name]
    assert len(checks) == 1
    assert passes(checks)
    assert checks[0].proves_adapter
    assert checks[0].remarks[-1].startswith("There is no comparison for information: the base in nf4 + adapter")


def test_4bit_base_that_fits_nowhere_is_no_capacity(base, adapter, merged_nf4, scratch):
    found = check(base, scratch, subject(base, adapter, merged_nf4, base_quantization="nf4"), host_bytes=100_000)
    (error,) = found.values()
    assert isinstance(error, NoCapacityError)
    assert "4-bit weights cannot stay on disk" in str(error)


def test_missing_tensor_fails_alone(base, adapter, merged, broken, scratch):
    wrong = broken(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    found = check(base, scratch, subject(base, adapter, wrong), subject(base, adapter, merged))
    assert isinstance(found[wrong.name], ParityFailedError)
    assert "missing keys: model.layers.1.mlp.up_proj.weight" in str(found[wrong.name])
    assert passes(found[merged.name])


def test_unexpected_tensor_fails(base, adapter, broken, scratch):
    wrong = broken(lambda tensors: tensors.update({"model.layers.0.lora_A.weight": torch.ones(2)}))
    found = check(base, scratch, subject(base, adapter, wrong))[wrong.name]
    assert isinstance(found, ParityFailedError)
    assert "unexpected keys: model.layers.0.lora_A.weight" in str(found)


def test_tensor_that_the_base_stores_beside_its_model_is_no_misfit(base, adapter, merged, tmp_path, scratch):
    places = [shutil.copytree(place, tmp_path / name) for place, name in ((base, "own"), (merged, "made"))]
    for place in places:
        tensors = {"mtp.mask": torch.zeros(3, dtype=torch.uint32)}
        for path in [*place.glob("*.safetensors")]:
            tensors |= load_file(path)
            path.unlink()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    assert passes(check(places[0], scratch, subject(places[0], adapter, places[1]))["made"])


def test_tensor_of_another_shape_fails(base, adapter, broken, scratch):
    wrong = broken(lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    found = check(base, scratch, subject(base, adapter, wrong))[wrong.name]
    assert isinstance(found, ParityFailedError)
    assert "model.norm.weight" in str(found)


def test_non_finite_logits_fail(base, adapter, broken, scratch):
    wrong = broken(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    found = check(base, scratch, subject(base, adapter, wrong))[wrong.name]
    assert isinstance(found, ParityFailedError)
    assert "finite" in str(found)


def test_merged_checkpoint_with_quantization_config_fails(base, adapter, merged, tmp_path, scratch):
    wrong = shutil.copytree(merged, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    found = check(base, scratch, subject(base, adapter, wrong))[wrong.name]
    assert isinstance(found, ParityFailedError)
    assert "quantization_config" in str(found)


def test_adapter_with_tensors_peft_does_not_know_is_bad_input(base, adapter, merged, tmp_path, scratch):
    strange = shutil.copytree(adapter, tmp_path / "strange")
    tensors = load_file(strange / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.7").replace("layers.1", "layers.7")] = tensors.pop(name)
    save_file(tensors, strange / "adapter_model.safetensors")
    found = check(base, scratch, subject(base, strange, merged))[merged.name]
    assert isinstance(found, BadInputError)
    assert "layers.7" in str(found)


def test_without_a_tokenizer_prompts_are_drawn(places, scratch):
    base = build_llama(places / "mute", tokenizer=False)
    adapter = make_adapter(base, places / "mute-adapter")
    merged = merge_with_peft(base, adapter, places / "mute-merged")
    checks = check(base, scratch, subject(base, adapter, merged, parity={}))[merged.name]
    assert passes(checks)
    assert checks[0].prompts[0].prompt.startswith("token ids ")
    assert checks[0].prompts[0].merged_text.startswith("token ids ")
    asked = subject(base, adapter, merged, parity={"prompts": ["Hello"]})
    found = check(base, scratch, asked)[merged.name]
    assert isinstance(found, BadInputError)
    assert "no tokenizer" in str(found)


def test_generation_settings_of_the_base_do_not_matter(places, base, adapter, merged, scratch):
    changed = shutil.copytree(base, places / "changed")
    settings = json.loads((changed / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 9.0, "repetition_penalty": 4.0, "max_length": 3}
    (changed / "generation_config.json").write_text(json.dumps(settings))
    expected = check(base, scratch, subject(base, adapter, merged))[merged.name]
    assert check(changed, scratch, subject(changed, adapter, merged))[merged.name] == expected


@pytest.mark.parametrize("after", [0, 3, 12, 20])
def test_cancelling_stops_and_leaves_nothing(base, adapter, merged, scratch, after):
    calls = 0

    def cancel() -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise CancelledError("stop")

    with pytest.raises(CancelledError):
        check_behaviour(base, [subject(base, adapter, merged)], CPU, scratch, cancelled=cancel)
    assert calls == after + 1
    assert not list(scratch.iterdir())


def test_nothing_on_the_terminal(base, adapter, merged, scratch, capfd, caplog):
    check(base, scratch, subject(base, adapter, merged))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_request_quantization_names_the_reference(base, adapter, merged_nf4, scratch):
    one = subject(base, adapter, merged_nf4, base_quantization=BaseQuantization.NF4)
    gate, other = check(base, scratch, one)[merged_nf4.name]
    assert gate.reference == "the base in nf4 + adapter"
    assert other.reference == "the base in its own weights + adapter"


def test_a_base_stored_in_4bit_runs_in_float32(tmp_path):
    stored = build_bnb_4bit(build_llama(tmp_path / "base"), tmp_path / "stored")

    running = load_model(stored, Room(device=torch.device("cpu"), scratch=tmp_path, host_bytes=None))

    assert {parameter.dtype for parameter in running.model.parameters()} == {torch.float32, torch.uint8}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_4bit_weights_whose_rows_are_no_whole_blocks_run_with_their_own_scales(
    tmp_path, scratch, quant_type, double_quant
):
    wide = build_llama(tmp_path / "base", hidden_size=160, intermediate_size=208)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    running = load_model(wide, Room(device=CPU, scratch=scratch), config)
    expected = load_plain(wide).float().eval()
    for name, module in expected.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            codes, state = bnb.quantize_4bit(
                weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
            )
            module.weight.data = dequantize_without_kernel(codes, state)
    ids = list(range(7, 40))
    with torch.inference_mode():
        logits_TV = expected(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(running.logits(ids, len(ids)), logits_TV, rtol=1e-4, atol=1e-4)
