"""Heads that classify, trained on a model that continues text: the release is a model of the class PEFT merges into."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, BitsAndBytesConfig

from jobs.combination import Combination
from jobs.errors import MergefleetError, UnsupportedError
from jobs.request import MergeRequest
from tests import architectures
from tests.merges import different, plan_pass, plan_requests, read_tensors
from tests.models import build_llama, build_qwen2, make_adapter
from workers.merging.checks.evidence import Evidence
from workers.merging.sidecars import write_sidecars
from workers.parity.inference import quiet_libraries

CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
ARITHMETIC = {"parity": {"level": "arithmetic"}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """Its head is its embedding."""
    return build_qwen2(tmp_path_factory.mktemp("base") / "qwen2")


def load(base, task, num_labels, **how):
    with quiet_libraries():
        return CLASSES[task].from_pretrained(base, num_labels=num_labels, dtype="auto", pad_token_id=1, **how)


def train_head(base, directory, task, num_labels, **config):
    """Make an adapter as PEFT saves it for a task, with a head that was trained whole."""
    torch.manual_seed(1)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config
    model = get_peft_model(load(base, task, num_labels), LoraConfig(task_type=task, **fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(directory)
    return directory


def release(planned):
    """Write all files of a release, and return its directory."""
    assert not planned.run().errors
    write_sidecars(planned.plans[0], planned.output("job"))
    return planned.output("job")


def refusal(base, adapter, directory, **fields):
    with pytest.raises(MergefleetError) as error:
        plan_pass(base, {"job": adapter}, directory, **fields)
    return str(error.value)


@pytest.mark.parametrize("base_name", ["llama", "qwen2"])
@pytest.mark.parametrize(("task", "num_labels"), [("SEQ_CLS", 1), ("SEQ_CLS", 2), ("SEQ_CLS", 3), ("TOKEN_CLS", 5)])
def test_the_release_is_what_peft_saves(request, tmp_path, base_name, task, num_labels):
    """Bits of all tensors, and logits of the release as transformers loads it, of the class PEFT was given."""
    base = request.getfixturevalue(base_name)
    adapter = train_head(base, tmp_path / "adapter", task, num_labels)
    with quiet_libraries():
        merged = PeftModel.from_pretrained(load(base, task, num_labels), adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "peft")
    planned = plan_pass(base, {"job": adapter}, tmp_path / "ours", **ARITHMETIC)
    ours = release(planned)
    assert different(read_tensors(ours), read_tensors(tmp_path / "peft")) == []
    with quiet_libraries():
        loaded, info = CLASSES[task].from_pretrained(ours, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, merged(ids).logits)
    config = json.loads((ours / "config.json").read_text())
    assert config["architectures"] == [type(merged).__name__]
    assert len(config["id2label"]) == loaded.config.num_labels == num_labels
    checks = planned.check()["job"]
    assert checks["score.weight"].targeted
    assert not any(check.num_bad_elements for check in checks.values())
    assert Evidence(planned.plans[0]).unfounded(checks) == ()
    notes = " ".join(planned.plans[0].notes)
    assert f"the release is a {type(merged).__name__}" in notes
    assert ("has no pad_token_id" in notes) == (task == "SEQ_CLS")


@pytest.mark.parametrize("saved_as", [None, ["score"], ["classifier", "score"]])
def test_a_head_that_the_configuration_names_or_not(llama, tmp_path, saved_as):
    """TRL and others leave `score.weight` in the file, with or without a word in modules_to_save."""
    adapter = train_head(llama, tmp_path / "adapter", "SEQ_CLS", 1)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": saved_as}))
    ours = release(plan_pass(llama, {"job": adapter}, tmp_path / "ours", **ARITHMETIC))
    score = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(read_tensors(ours)["score.weight"], score)
    assert "lm_head.weight" not in read_tensors(ours)


def test_a_head_on_a_base_in_four_bits(llama, tmp_path):
    adapter = train_head(llama, tmp_path / "adapter", "SEQ_CLS", 2)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["score", "lm_head"])
    with quiet_libraries():
        model = load(llama, "SEQ_CLS", 2, quantization_config=how, device_map="cpu").dequantize()
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
    ours = release(plan_pass(llama, {"job": adapter}, tmp_path / "ours", base_quantization="nf4", **ARITHMETIC))
    assert different(read_tensors(ours), read_tensors(tmp_path / "peft")) == []


def test_adapters_with_and_without_a_head_share_a_pass(llama, tmp_path):
    """One base, one walk: a model that continues text and two that classify."""
    adapters = {
        "text": make_adapter(llama, tmp_path / "text"),
        "one": train_head(llama, tmp_path / "one", "SEQ_CLS", 1, use_dora=True),
        "five": train_head(llama, tmp_path / "five", "TOKEN_CLS", 5, target_modules=["k_proj", "up_proj"]),
    }
    planned = plan_pass(llama, adapters, tmp_path / "ours", **ARITHMETIC)
    assert not planned.run().errors
    for name, adapter in adapters.items():
        alone = plan_pass(llama, {"job": adapter}, tmp_path / f"alone-{name}", **ARITHMETIC)
        assert not alone.run().errors
        assert different(read_tensors(planned.output(name)), read_tensors(alone.output("job"))) == []
    heads = [{n for n in read_tensors(planned.output(name)) if n.startswith(("score", "lm_head"))} for name in adapters]
    assert heads == [{"lm_head.weight"}, {"score.weight"}, {"score.weight", "score.bias"}]


def test_labels_that_the_base_names_are_kept(tmp_path):
    base = build_llama(tmp_path / "base", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    adapter = train_head(base, tmp_path / "adapter", "SEQ_CLS", 2)
    ours = release(plan_pass(base, {"job": adapter}, tmp_path / "ours", **ARITHMETIC))
    assert AutoModelForSequenceClassification.from_pretrained(ours).config.id2label == {0: "bad", 1: "good"}


def test_what_has_no_place_for_a_head_is_refused(llama, tmp_path):
    adapter = train_head(llama, tmp_path / "adapter", "TOKEN_CLS", 3)
    assert "request parity level: arithmetic" in refusal(llama, adapter, tmp_path / "1")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("score.bias")}, path)
    assert "and not score.bias, which that class has, too" in refusal(llama, adapter, tmp_path / "2", **ARITHMETIC)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "CAUSAL_LM"}))
    said = refusal(llama, adapter, tmp_path / "3", **ARITHMETIC)
    assert "it is the head of a model that does not continue text (task_type CAUSAL_LM)" in said
    encoder = architectures.build("encoder", "bert", tmp_path / "bert")
    with quiet_libraries():
        model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(tmp_path / "e")
    said = refusal(encoder, tmp_path / "e", tmp_path / "4", **ARITHMETIC)
    assert "load the base as AutoModelForSequenceClassification" in said


def test_heads_are_not_combined(llama, tmp_path):
    parts = [train_head(llama, tmp_path / name, "SEQ_CLS", 1) for name in "ab"]
    request = MergeRequest(
        base=str(llama),
        adapters=[{"adapter": str(part), "weight": 1.0} for part in parts],
        combination=Combination(type="linear"),
        destination=str(tmp_path / "release"),
        base_quantization="none",
        **ARITHMETIC,
    )
    with pytest.raises(UnsupportedError, match="brings a head for a LlamaForSequenceClassification"):
        plan_requests([request], tmp_path / "ours")
