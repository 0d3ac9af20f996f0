"""Releases as GGUF: what transformers makes of them, and what is found in one that is not right."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from jobs.errors import BadInputError, NoCapacityError
from jobs.parity_report import ParityReport
from jobs.request import MergeRequest
from tests import gguf_models
from tests.contract.places import DirectoryPlace, S3Place
from tests.gguf_models import CONFIGS, TEXTS, byte_level
from tests.killing import FULL, assert_whole, files_below, killed, merged_again, requests_for
from tests.merges import different, merge_by_peft, plan_requests, read_tensors, release
from tests.models import build_llama, make_adapter
from tests.stored import twin_of
from tests.stored.fp8_blocks import store_fp8
from workers.bases.gguf_files.tensors import GgufTensor
from workers.merging.pieces import pieces_of
from workers.parity.inference import quiet_libraries
from workers.parity.loading import Room, load_model
from workers.releases.checks.rules import Severity
from workers.releases.delivery import verify_release
from workers.unit.checking import check_release

WIDE = {**FULL, "thresholds": {"max_mean_kl": 5, "min_top1_agreement": 0, "max_lost_share": 1, "min_survival": 0}}
OUTPUTS = {"gguf": "model-BF16.gguf", "gguf_q8_0": "model-Q8_0.gguf"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = {kind: kind.replace(" ", "-") for kind in CONFIGS}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Bases and adapters by kind: each made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("sources"), {}

    def get(kind):
        if kind not in made:
            base = gguf_models.build(kind, root / IDS[kind] / "base")
            if kind == "qwen2":  # whose class splits text its own way, whatever the file says
                byte_level(base, "qwen2")
            made[kind] = base, make_adapter(base, root / IDS[kind] / "adapter", targets=TARGETS, std=0.2)
        return made[kind]

    return get


def refused(worker, sources, tmp_path, output="gguf", **fields):
    outcome = release(worker, sources, tmp_path / "release", output, **fields)
    assert outcome.failure is not None
    assert not (tmp_path / "release").exists()
    return outcome.failure.message


def load_gguf(directory, file, *, by_config):
    """Load by transformers alone; with the configuration beside the file, or the one that its reader makes of it."""
    config = AutoConfig.from_pretrained(directory) if by_config else None
    with quiet_libraries():
        return AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file=file,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()


def reference(sources, directory, output):
    """Return PEFT's merge in float32; for 8 bits, its matrices through the `gguf` package and back."""
    merge_by_peft(*sources, directory / "peft")
    model = AutoModelForCausalLM.from_pretrained(directory / "peft", dtype=torch.float32).eval()
    if output == "gguf_q8_0":
        kind = GGMLQuantizationType.Q8_0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and not name.endswith("mlp.gate.weight"):
                    codes = quantize(parameter.numpy(), kind)
                    parameter.copy_(torch.from_numpy(dequantize(codes, kind)))
    return model


def tokens(model, directory):
    ids = AutoTokenizer.from_pretrained(directory)("The capital of France is", return_tensors="pt")["input_ids"]
    return model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", CONFIGS, ids=IDS.values())
def test_transformers_loads_it_and_goes_on_with_the_same_tokens(worker, sources, tmp_path, kind, output):
    """Weights bit for bit those of PEFT's merge (of 8 bits, what its codes stand for), and 24 greedy tokens."""
    outcome = release(worker, sources(kind), tmp_path / "release", output)
    assert outcome.failure is None, outcome.failure
    # Its reader makes a Llama of every `llama`, and loses experts' widths and scaled frequencies.
    by_config = kind in ("llama 3.1", "qwen3_moe", "llama with biases")
    loaded = load_gguf(tmp_path / "release", OUTPUTS[output], by_config=by_config)
    expected = reference(sources(kind), tmp_path, output)
    assert different(dict(loaded.state_dict()), dict(expected.state_dict())) == []
    assert torch.equal(tokens(loaded, tmp_path / "release"), tokens(expected, tmp_path / "release"))


@pytest.mark.parametrize("kind", CONFIGS, ids=IDS.values())
def test_the_configuration_in_the_file_is_that_beside_it(worker, sources, tmp_path, kind):
    """As transformers reads both; fields that its reader of GGUF does not know are left out."""
    assert release(worker, sources(kind), tmp_path / "release", "gguf").failure is None
    inside = AutoConfig.from_pretrained(tmp_path / "release", gguf_file="model-BF16.gguf")
    beside = AutoConfig.from_pretrained(tmp_path / "release")
    for name in (
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("max_position_embeddings", "vocab_size", "tie_word_embeddings", "head_dim", "num_experts"),
        *("num_experts_per_tok", "bos_token_id", "eos_token_id"),
    ):
        if name == "head_dim" and kind == "qwen2":
            continue  # it has none
        assert getattr(inside, name, None) == getattr(beside, name, None), name
    assert inside.rms_norm_eps == pytest.approx(beside.rms_norm_eps)
    assert inside.rope_parameters["rope_theta"] == beside.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_tokenizer_in_the_file_makes_the_same_ids(worker, sources, tmp_path, kind):
    assert release(worker, sources(kind), tmp_path / "release", "gguf").failure is None
    inside = AutoTokenizer.from_pretrained(tmp_path / "release", gguf_file="model-BF16.gguf")
    beside = Tokenizer.from_file(str(tmp_path / "release" / "tokenizer.json"))
    for text in TEXTS:
        assert inside(text)["input_ids"] == beside.encode(text).ids, text
    template = GGUFReader(tmp_path / "release" / "model-BF16.gguf").fields["tokenizer.chat_template"].contents()
    assert template == (tmp_path / "release" / "chat_template.jinja").read_text()


def test_frequencies_of_llama_3_are_divided_as_transformers_divides_them(worker, sources, tmp_path):
    """By angles that llama.cpp turns by: position / (theta ** (2 i / d) * factor)."""
    assert release(worker, sources("llama 3.1"), tmp_path / "release", "gguf").failure is None
    (found,) = (each for each in GGUFReader(tmp_path / "release" / "model-BF16.gguf").tensors if "rope" in each.name)
    model = AutoModelForCausalLM.from_pretrained(sources("llama 3.1")[0])
    size = model.config.head_dim
    plain = 10000.0 ** (-np.arange(0, size, 2) / size)
    np.testing.assert_allclose(plain / found.data, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert found.data.min() == 1
    assert found.data.max() == pytest.approx(8)


def test_vectors_are_float32_and_matrices_as_they_were_merged(worker, sources, tmp_path):
    assert release(worker, sources("qwen3_moe"), tmp_path / "release", "gguf_q8_0").failure is None
    kinds = {}
    for each in GGUFReader(tmp_path / "release" / "model-Q8_0.gguf").tensors:
        kinds.setdefault(each.tensor_type.name, set()).add(each.name.split(".")[-2])
    assert kinds["Q8_0"] >= {"token_embd", "output", "attn_q", "ffn_down_exps"}
    assert kinds["F32"] == {"ffn_gate_inp", "attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "output_norm"}
    assert set(kinds) == {"Q8_0", "F32"}


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_numbers_are_in_the_dtype_that_is_asked_for(worker, sources, tmp_path, dtype):
    assert release(worker, sources("llama"), tmp_path / "release", "gguf", dtype=dtype).failure is None
    kind = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}[dtype]
    loaded = load_gguf(tmp_path / "release", f"model-{kind}.gguf", by_config=True)
    assert release(worker, sources("llama"), tmp_path / "plain", "16bit", dtype=dtype).failure is None
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert different(dict(loaded.state_dict()), dict(expected.state_dict())) == []


def test_rows_that_fall_into_no_blocks_stay_numbers(worker, tmp_path):
    base = gguf_models.build("llama", tmp_path / "base", intermediate_size=200)
    adapter = make_adapter(base, tmp_path / "adapter", targets=TARGETS, std=0.2)
    assert release(worker, (base, adapter), tmp_path / "release", "gguf_q8_0").failure is None
    found = {each.name: each.tensor_type.name for each in GGUFReader(tmp_path / "release/model-Q8_0.gguf").tensors}
    assert found["blk.0.ffn_down.weight"] == "BF16"
    assert found["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_tied_head_is_not_stored_twice_and_one_that_came_apart_is(worker, sources, tmp_path):
    base, adapter = sources("qwen2")
    assert release(worker, (base, adapter), tmp_path / "tied", "gguf").failure is None
    assert "output.weight" not in names_in(tmp_path / "tied" / "model-BF16.gguf")
    head = make_adapter(base, tmp_path / "head", targets=["lm_head", "q_proj"], std=0.2)
    outcome = release(worker, (base, head), tmp_path / "apart", "gguf")
    assert outcome.failure is None, outcome.failure
    assert "output.weight" in names_in(tmp_path / "apart" / "model-BF16.gguf")
    loaded = load_gguf(tmp_path / "apart", "model-BF16.gguf", by_config=True)
    assert release(worker, (base, head), tmp_path / "plain", "16bit").failure is None
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert different(dict(loaded.state_dict()), dict(expected.state_dict())) == []


def names_in(file):
    return [each.name for each in GGUFReader(file).tensors]


@pytest.mark.parametrize("of", ["fp8", "nf4"])
def test_other_weights_are_merged_into_as_ever(worker, sources, tmp_path, of):
    """A base in FP8, and one through 4 bits: the numbers are those of the release in 16 bits."""
    base, adapter = sources("llama")
    if of == "fp8":
        base = store_fp8(base, tmp_path / "fp8", block=(32, 32))
    quantization = "stored" if of == "fp8" else "nf4"
    for output in ("gguf", "16bit"):
        outcome = release(worker, (base, adapter), tmp_path / output, output, base_quantization=quantization)
        assert outcome.failure is None, outcome.failure
    loaded = load_gguf(tmp_path / "gguf", "model-BF16.gguf", by_config=True)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "16bit", dtype=torch.float32)
    assert different(dict(loaded.state_dict()), dict(expected.state_dict())) == []
    if of == "fp8":
        assert twin_of(base)


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", ["mistral", "qwen3_moe", "llama 3.1"])
def test_what_ships_is_run_at_level_full(worker, sources, tmp_path, kind, output):
    outcome = release(worker, sources(kind), tmp_path / "release", output, parity=FULL)
    assert outcome.failure is None, outcome.failure
    assert outcome.release.manifest.output == output
    assert 0 < outcome.release.manifest.parity.mean_kl < 0.01
    assert ModelCard.load(tmp_path / "release" / "README.md").data.tags == ["gguf", "mergefleet"]
    report = ParityReport.model_validate_json((tmp_path / "release" / "parity.json").read_bytes())
    figures = {check.tensor: check for check in report.tensors}
    assert figures["blk.0.attn_q.weight"].survival > 0.9
    assert (figures["blk.0.attn_q.weight"].requantization_error is not None) == (output == "gguf_q8_0")
    assert not figures["blk.0.attn_norm.weight"].changed


def test_a_file_that_memory_does_not_hold_is_not_run(worker, sources, tmp_path):
    """Of safetensors, weights would stay on the disk."""
    assert release(worker, sources("llama"), tmp_path / "release", "gguf").failure is None
    room = Room(device=torch.device("cpu"), scratch=tmp_path, host_bytes=300_000)
    with pytest.raises(NoCapacityError, match="parity level: arithmetic"):
        load_model(tmp_path / "release", room)


@pytest.mark.slow
def test_the_other_way_of_a_comparison_is_a_file_too(worker, sources, tmp_path):
    """What it says is what a release says that is made that way."""
    both = release(worker, sources("llama"), tmp_path / "both", "gguf_q8_0", compare=True, parity=WIDE)
    alone = release(worker, sources("llama"), tmp_path / "alone", "gguf_q8_0", base_quantization="nf4", parity=WIDE)
    assert (both.failure, alone.failure) == (None, None)
    alternative, made = (
        ParityReport.model_validate_json((tmp_path / name / "parity.json").read_bytes()) for name in ("both", "alone")
    )
    assert alternative.alternative.base_quantization == "nf4"
    assert alternative.alternative.behaviour == made.behaviour


def test_tokens_that_an_adapter_brings_are_in_the_file(worker, sources, tmp_path):
    """Its tokenizer, and as many rows as its embedding has."""
    base, _ = sources("llama")
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"<extra-{number}>" for number in range(140)])
        model.resize_token_embeddings(len(tokenizer))
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
    outcome = release(worker, (base, tmp_path / "adapter"), tmp_path / "release", "gguf_q8_0")
    assert outcome.failure is None, outcome.failure
    reader = GGUFReader(tmp_path / "release" / "model-Q8_0.gguf")
    told = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(told) == len(tokenizer) == reader.fields["llama.vocab_size"].contents()
    assert told[-1] == "<extra-139>"
    assert {each.name: int(each.shape[-1]) for each in reader.tensors}["token_embd.weight"] == len(tokenizer)


def test_a_delta_that_8_bits_erase_fails_the_release(worker, sources, tmp_path):
    """A base that lies on the steps of Q8_0 itself: what is less than half a step is gone."""
    base = shutil.copytree(sources("llama")[0], tmp_path / "base")
    tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            codes = quantize(tensor.numpy(), GGMLQuantizationType.Q8_0)
            tensors[name] = torch.from_numpy(dequantize(codes, GGMLQuantizationType.Q8_0)).clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _config(base, dtype="float32")
    faint = make_adapter(base, tmp_path / "faint", targets=["q_proj"], std=1e-4)
    message = refused(worker, (base, faint), tmp_path, "gguf_q8_0")
    assert "of the adapter's delta is left" in message
    assert "blk." in message
    outcome = release(worker, (base, faint), tmp_path / "plain", "gguf")
    assert outcome.failure is None
    assert outcome.release.manifest.parity.min_survival > 0.9


# What is wrong is found.


def interleave_nothing(monkeypatch):
    monkeypatch.setattr(GgufTensor, "interleaved", lambda _self, rows: rows)


def swap_experts(monkeypatch):
    from workers.merging import gguf_writing

    real = gguf_writing._write

    def write(tensor, *rest):
        import dataclasses

        real(dataclasses.replace(tensor, sources=tensor.sources[::-1]), *rest)

    monkeypatch.setattr(gguf_writing, "_write", write)


def flip_a_byte(monkeypatch):
    real = GgufTensor.encode

    def encode(self, rows):
        data = real(self, rows).clone()
        if self.name == "blk.1.ffn_up.weight" and not encode.done:
            data[100] ^= 1
            encode.done = True
        return data

    encode.done = False
    monkeypatch.setattr(GgufTensor, "encode", encode)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("kind", "fault", "named"),
    [
        ("llama", interleave_nothing, r"blk\.0\.attn_[kq]\.weight"),
        ("llama", flip_a_byte, r"blk\.1\.ffn_up\.weight: 1 "),
        ("qwen3_moe", swap_experts, r"blk\.0\.ffn_(gate|up|down)_exps\.weight"),
    ],
)
def test_a_file_that_is_not_the_merge_fails_parity(worker, sources, tmp_path, monkeypatch, output, kind, fault, named):
    """Queries in the order of the model, one byte, experts in another order: each is named, and nothing published."""
    source = sources(kind)
    fault(monkeypatch)
    outcome = release(worker, source, tmp_path / "release", output)
    assert outcome.failure is not None
    assert outcome.failure.failure_class == "parity_failed"
    assert re.search(named, outcome.failure.message), outcome.failure.message
    assert not (tmp_path / "release").exists()


def test_values_that_no_scale_reaches_are_refused_by_name(worker, sources, tmp_path):
    """65504 x 127 is what Q8_0 holds; float16 holds 65504."""
    base, adapter = sources("llama")
    large = shutil.copytree(base, tmp_path / "large")
    tensors = {name: tensor.clone() for name, tensor in load_file(large / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e7
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    message = refused(worker, (large, adapter), tmp_path, "gguf_q8_0")
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "too large for Q8_0" in message
    message = refused(worker, (large, adapter), tmp_path, "gguf", dtype="float16")
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "float16 cannot hold" in message
    assert release(worker, (large, adapter), tmp_path / "plain", "gguf").failure is None


def _config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def _tokenizer(directory, **fields):
    found = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(found | fields))


REFUSALS = {
    "scaled rotary frequencies": (
        lambda it: _config(it, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        ["rope_type", "yarn", "output: 16bit"],
    ),
    "another activation": (lambda it: _config(it, hidden_act="gelu"), ["hidden_act", "silu", "gelu", "output: 16bit"]),
    "no tokenizer": (lambda it: (it / "tokenizer.json").unlink(), ["tokenizer.json", "found none"]),
    "text split in a way that is not known": (
        lambda it: _tokenizer(it, pre_tokenizer={"type": "Whitespace"}),
        ["pre_tokenizer", "tokenizer.ggml.pre", "output: 16bit"],
    ),
    "an unknown normalizer": (
        lambda it: _tokenizer(it, normalizer={"type": "Lowercase"}),
        ["pre_tokenizer", "output: 16bit"],
    ),
}


@pytest.mark.parametrize("of", REFUSALS)
def test_what_llama_cpp_would_read_otherwise_is_refused_when_it_is_planned(worker, sources, tmp_path, of):
    base, adapter = sources("llama")
    fault, words = REFUSALS[of]
    changed = shutil.copytree(base, tmp_path / "base")
    fault(changed)
    message = refused(worker, (changed, adapter), tmp_path)
    for word in words:
        assert word in message, message


def test_other_architectures_are_refused_by_name(worker, tmp_path):
    from tests import architectures

    base = architectures.build("decoder", "gpt2", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", targets=["c_attn"], rank=2)
    message = refused(worker, (base, adapter), tmp_path)
    assert "found GPT2LMHeadModel" in message
    assert "convert_hf_to_gguf.py" in message


def test_a_window_that_slides_is_refused(worker, tmp_path):
    base = gguf_models.build("mistral", tmp_path / "base", sliding_window=32)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], rank=2)
    assert "sliding_window" in refused(worker, (base, adapter), tmp_path)


def test_tokens_beyond_the_embedding_are_refused(worker, tmp_path):
    base = gguf_models.build("llama", tmp_path / "base", vocab_size=300)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], rank=2)
    message = refused(worker, (base, adapter), tmp_path)
    assert "300 rows" in message


def test_max_shard_size_does_not_go_with_one_file(tmp_path):
    fields = {"base": "/b", "adapter": "/a", "destination": str(tmp_path / "r"), "max_shard_size": "1GB"}
    with pytest.raises(ValueError, match="which is one file"):
        MergeRequest(id="x", output="gguf", **fields)


# How it gets to where it goes.


@pytest.mark.slow
def test_two_workers_make_the_same_bytes(tmp_path, sources):
    """In processes of their own, whose sets have orders of their own."""
    import os
    import subprocess
    import sys

    base, adapter = sources("llama")
    program = (
        "import sys; from pathlib import Path; from jobs.request import MergeRequest\n"
        "from tests.dying import settings_in; from workers.worker import MergeWorker\n"
        "base, adapter, home = sys.argv[1:]; worker = MergeWorker(settings_in(Path(home)))\n"
        "request = MergeRequest(id='one', base=base, adapter=adapter, destination=home + '/release',"
        " output='gguf_q8_0', base_quantization='none', parity={'level': 'arithmetic'})\n"
        "(job,) = worker.run_unit('unit', (request,)).jobs; assert job.failure is None, job.failure\n"
        "assert worker.publish('one', None).failure is None; worker.close()\n"
    )
    for seed in ("1", "2"):
        home = tmp_path / seed
        home.mkdir()
        command = [sys.executable, "-c", program, str(base), str(adapter), str(home)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, timeout=300)
    one, other = (files_below(tmp_path / seed / "release") for seed in ("1", "2"))
    assert one == other


def test_siblings_are_merged_in_one_pass(worker, sources, tmp_path):
    base, adapter = sources("llama")
    common = {"base": str(base), "adapter": str(adapter), "base_quantization": "none"}
    requests = tuple(
        MergeRequest(
            id=output.replace("_", "-"),
            output=output,
            destination=str(tmp_path / "releases" / output),
            parity={"level": "arithmetic"},
            **common,
        )
        for output in ("16bit", *OUTPUTS)
    )
    outcome = worker.run_unit("unit", requests)
    assert [job.failure for job in outcome.jobs] == [None] * 3
    for request in requests:
        assert worker.publish(request.id, None).failure is None
    expected = merge_by_peft(base, adapter, tmp_path / "peft")
    assert different(read_tensors(tmp_path / "releases" / "16bit"), expected) == []
    assert (tmp_path / "releases" / "gguf" / "model-BF16.gguf").is_file()
    assert (tmp_path / "releases" / "gguf_q8_0" / "model-Q8_0.gguf").is_file()


def test_a_file_takes_all_shards_of_its_base(tmp_path):
    base = build_llama(tmp_path / "base", max_shard_size="100KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    asked = [
        MergeRequest(
            id=output,
            base=str(base),
            adapter=str(adapter),
            destination=str(tmp_path / output),
            output=output,
            base_quantization="none",
        )
        for output in ("16bit", "gguf")
    ]
    plain, gguf = plan_requests(asked, tmp_path).plans
    assert len(pieces_of([plain])) > 2
    assert len(pieces_of([gguf])) == 1
    together = next(piece for piece in pieces_of([plain, gguf]) if "model-BF16.gguf" in piece.shards)
    assert set(together.shards) == {"model-BF16.gguf", *(shard.name for shard in gguf.merged.shards)}


@pytest.mark.s3
@pytest.mark.parametrize("output", OUTPUTS)
def test_on_a_store_it_is_that_of_a_directory(s3, tmp_path, sources, output):
    fields = {"output": output}
    here = DirectoryPlace(tmp_path / "here")
    merged_again(here, requests_for(sources("llama"), [here.location], **fields))
    place = S3Place(tmp_path / "home", s3, f"gguf/{output.replace('_', '-')}")
    merged_again(place, requests_for(sources("llama"), [place.location], **fields))
    assert_whole(place, files_below(here.location.path), tmp_path)


@pytest.mark.s3
def test_a_file_at_a_store_is_checked_by_its_front(s3, tmp_path, sources):
    """As a merge has it: no fault; with its last bytes gone: one, and neither `verify` lets it through."""
    place = S3Place(tmp_path / "home", s3, "gguf/checked")
    merged_again(place, requests_for(sources("llama"), [place.location], output="gguf"))
    found = check_release(place.location, tmp_path / "check")
    assert [each.rule.id for each in found if each.severity is not Severity.NOTE] == []
    assert "gguf.alone" in {each.rule.id for each in found}
    verify_release(place.location, tmp_path / "verify")
    place.write("model-BF16.gguf", place.visible()["model-BF16.gguf"][:-5000])
    found = check_release(place.location, tmp_path / "check")
    assert [each.rule.id for each in found if each.severity is Severity.ERROR] == ["gguf.truncated"]
    with pytest.raises(BadInputError, match=r"model-BF16\.gguf"):
        verify_release(place.location, tmp_path / "verify")


def test_a_release_without_its_file_is_none(tmp_path, sources):
    place = DirectoryPlace(tmp_path)
    merged_again(place, requests_for(sources("llama"), [place.location], output="gguf"))
    manifest = place.location.path / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"] = [each for each in content["files"] if not each["path"].endswith(".gguf")]
    manifest.write_text(json.dumps(content))
    (place.location.path / "model-BF16.gguf").unlink()
    with pytest.raises(BadInputError, match=r"\*\.gguf: not in the manifest"):
        verify_release(place.location, tmp_path / "verify")


@pytest.mark.slow
@pytest.mark.parametrize("die", ["put", "record"])
def test_an_attempt_after_one_that_was_killed_makes_the_same(tmp_path, sources, die):
    fields = {"output": "gguf_q8_0"}
    undisturbed, place = DirectoryPlace(tmp_path / "undisturbed"), DirectoryPlace(tmp_path / "home")
    merged_again(undisturbed, requests_for(sources("llama"), [undisturbed.location], **fields))
    requests = requests_for(sources("llama"), [place.location], **fields)
    killed(place, requests, die, after=1)
    took = merged_again(place, requests)
    if die == "record":
        assert took.bytes_read == 0  # its file was finished, checked, and on record
    assert_whole(place, files_below(undisturbed.location.path), tmp_path)
