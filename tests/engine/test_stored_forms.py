"""Bases stored in other forms: called by their names, however they are declared, and never merged as if plain.

What no model takes, on the other hand, is copied to the byte, whatever its dtype.
"""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.errors import BadInputError, UnsupportedError
from jobs.locations import LocalPath
from jobs.request import MergeRequest
from tests.merges import plan_pass
from tests.models import build_bnb_4bit, build_llama, build_qwen2, make_adapter
from workers.files.checkpoint import read_checkpoint
from workers.merging.base_plan import plan_base
from workers.sources.fetch import fetch_base

LINEAR = "model.layers.0.mlp.down_proj"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "q", targets=["q_proj"])


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def plan(base, tmp_path, **fields):
    request = MergeRequest(
        base=str(base), adapter="/adapter", destination="/destination", parity={"level": "arithmetic"}, **fields
    )
    return plan_base(fetch_base(LocalPath(base), tmp_path / "cache"), request)


def refusal(base, tmp_path, **fields):
    with pytest.raises(UnsupportedError) as error:
        plan(base, tmp_path, **fields)
    message = str(error.value)
    assert "that it was made from" not in message
    return message


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(own, directory / "model.safetensors", metadata={"format": "pt"})


def codes(dtype, **beside):
    """Put codes in the place of a weight, and other tensors beside it."""

    def change(tensors):
        tensors[f"{LINEAR}.weight"] = tensors[f"{LINEAR}.weight"].to(dtype)
        tensors.update({f"{LINEAR}.{name}": value for name, value in beside.items()})

    return change


def pieces(**parts):
    """Put other tensors in the place of a weight."""

    def change(tensors):
        del tensors[f"{LINEAR}.weight"]
        tensors.update({f"{LINEAR}.{name}": value for name, value in parts.items()})

    return change


INTS, SCALES = torch.zeros(8, 8, dtype=torch.int32), torch.ones(8)
UNDECLARED = {
    "block FP8": (codes(FP8, weight_scale_inv=SCALES), ["weight_scale_inv (F32)", "stored as F8_E4M3", "FP8"]),
    "FP8 of ModelOpt": (codes(FP8, weight_scale=SCALES), ["weight_scale (F32)", "stored as F8_E4M3"]),
    "FP8 without scales": (codes(FP8), ["stored as F8_E4M3", "without any scales"]),
    "8-bit of bitsandbytes": (codes(torch.int8, SCB=SCALES), ["stored as I8", "SCB (F32)", "bitsandbytes 8-bit"]),
    "integers": (codes(torch.uint8), ["stored as U8"]),
    "words": (codes(torch.uint32, scales=SCALES, biases=SCALES), ["stored as U32", "quantized MLX"]),
    "GPTQ": (pieces(qweight=INTS, qzeros=INTS, scales=SCALES, g_idx=INTS), ["qweight (I32)", "GPTQ"]),
    "AWQ": (pieces(qweight=INTS, qzeros=INTS, scales=SCALES), ["qweight (I32)", "GPTQ or AWQ"]),
    "compressed-tensors": (pieces(weight_packed=INTS, weight_scale=SCALES), ["weight_packed", "compressed-tensors"]),
    "HQQ": (pieces(W_q=INTS), ["W_q (I32)", "HQQ"]),
    "codes cast to 16 bits": (codes(torch.bfloat16, weight_scale=SCALES), ["(BF16) has weight_scale (F32) beside it"]),
    "codes beside a scale": (codes(torch.bfloat16, scale=SCALES), ["(BF16) has scale (F32) beside it"]),
    "ComfyUI": (codes(torch.bfloat16, scale_weight=SCALES), ["(BF16) has scale_weight (F32) beside it"]),
    "FP8 of ComfyUI": (codes(FP8, scale_weight=SCALES), ["stored as F8_E4M3, beside scale_weight (F32)"]),
    "a quantizer's": (
        codes(torch.float16, **{"weight_quantizer._scale": SCALES}),
        ["(F16) has _scale (F32) beside it"],
    ),
    "below the weight": (codes(torch.bfloat16, **{"weight.qscale": SCALES}), ["(BF16) has qscale (F32) beside it"]),
    "torchao": (pieces(_weight_qdata=INTS, _weight_scale=SCALES), ["_weight_qdata (I32)", "torchao"]),
    "half a 4-bit weight": (codes(torch.uint8, **{"weight.absmax": SCALES}), ["stored as U8", "absmax (F32)"]),
}


@pytest.mark.parametrize("form", UNDECLARED)
def test_codes_that_nothing_declares_are_no_weights_in_any_dtype(copy, tmp_path, form):
    change, phrases = UNDECLARED[form]
    rewrite(copy, change)
    message = refusal(copy, tmp_path, base_quantization="none", dtype="bfloat16")
    assert refusal(copy, tmp_path, base_quantization="none") == message
    for phrase in (f"{LINEAR}.weight", "hf_quant_config.json", *phrases):
        assert phrase in message


DECLARED = {
    "of the text model": ("config.json", {"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "GPTQ"),
    "MLX": ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "quantized MLX"),
    "8-bit": (
        "config.json",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "bitsandbytes 8-bit",
    ),
    "not heard of": ("config.json", {"quantization_config": {"quant_method": "fancy"}}, "stored in fancy"),
    "AutoGPTQ": ("quantize_config.json", {"bits": 4, "group_size": 128}, "GPTQ"),
}


@pytest.mark.parametrize("form", DECLARED)
def test_a_declared_form_is_refused_by_its_name(copy, tmp_path, form):
    name, content, words = DECLARED[form]
    config = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
    (copy / name).write_text(json.dumps(config | content))
    message = refusal(copy, tmp_path)
    assert str(copy / name) in message
    assert words in message
    assert "16 or 32 bits" in message


def test_a_quantized_cache_is_no_quantized_weight(copy, tmp_path):
    quantization = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (copy / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    rewrite(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.k_scale": SCALES}))
    assert plan(copy, tmp_path).by_name["model.layers.0.self_attn.k_proj.k_scale"].copied


def test_4_bits_are_declared_where_transformers_writes_it(base, tmp_path):
    stored = build_bnb_4bit(base, tmp_path / "bnb")
    config = json.loads((stored / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (stored / "config.json").write_text(json.dumps(config))
    assert "move it there" in refusal(stored, tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model.Q4_K_M.gguf"], "GGUF"),
        (["consolidated.safetensors", "params.json", "tekken.json"], "maker's own files"),
        (["config.json", "tf_model.h5"], "TensorFlow"),
        (["config.json", "model.onnx"], "ONNX"),
        (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter"),
        (["model_index.json"], "diffusers"),
        (["consolidated.00.pth", "params.json"], "maker's own files"),
        (["config.json", "model.pth", "tf_model.h5", "model.onnx"], "pickle files"),
    ],
)
def test_files_of_another_kind_are_called_by_it(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UnsupportedError, match=words):
        fetch_base(LocalPath(tmp_path), tmp_path / "cache")


ODD = {
    "a.u16": ("U16", [], b"ab"),
    "a.u32": ("U32", [0, 4], b""),
    "a.u64": ("U64", [3], bytes(range(24))),
    "a.complex": ("C64", [2], bytes(range(16))),
    "a.exponents": ("F8_E8M0", [5], b"\xff\x01\x02\x03\x04"),
    "a.fnuz": ("F8_E5M2FNUZ", [1], b"\x80"),
    "a.f8": ("F8_E4M3", [3], b"\x7f\x01\x02"),
    "a.f6": ("F6_E2M3", [4], b"abc"),
    "a.f4": ("F4", [2, 3], b"\x12\x34\x56"),
    "a.mask": ("BOOL", [3, 1], b"\1\0\1"),
    "a.scalar": ("F32", [], b"\0\0\x80\x3f"),
    "a.position_ids": ("I64", [1, 2], bytes(16)),
}


def add(path, tensors):
    """Append tensors to a file; some of these dtypes are none of torch's."""
    raw = path.read_bytes()
    begin = 8 + struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8:begin]), raw[begin:]
    for name, (code, shape, content) in tensors.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def stored(directory):
    """Return dtype, shape and bytes of each tensor in a directory, and check that wide ones are aligned."""
    found = {}
    for path in directory.glob("*.safetensors"):
        raw = path.read_bytes()
        begin = 8 + struct.unpack("<Q", raw[:8])[0]
        for name, entry in json.loads(raw[8:begin]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found[name] = entry["dtype"], entry["shape"], raw[begin + start : begin + stop]
                if directory.name == "job" and entry["dtype"] in ("U64", "C64"):
                    assert (begin + start) % 8 == 0
    return found


@pytest.mark.parametrize(
    "fields",
    [{}, {"base_quantization": "nf4", "dtype": "float16", "max_shard_size": "100KB"}],
    ids=["as it is", "laid out anew"],
)
def test_what_no_model_takes_is_copied_to_the_byte(copy, adapter, tmp_path, fields):
    add(copy / "model.safetensors", ODD)
    planned = plan_pass(copy, {"job": adapter}, tmp_path / "pass", **fields)
    assert planned.run(checked=True).errors == {}
    assert not any(check.num_bad_elements for check in planned.check()["job"].values())
    merged = stored(planned.output("job"))
    numbers = {"a.scalar"} if "dtype" in fields else set()  # take the dtype that is asked for, as every number
    assert {name: merged[name] for name in ODD.keys() - numbers} == {name: ODD[name] for name in ODD.keys() - numbers}
    assert merged["model.layers.0.self_attn.q_proj.weight"] != stored(copy)["model.layers.0.self_attn.q_proj.weight"]


def test_scales_of_what_goes_through_a_module_are_no_part_of_its_weight(copy, tmp_path):
    attention = "model.layers.0.self_attn"
    names = [
        f"{LINEAR}.input_scale",
        f"{attention}.k_scale",
        f"{attention}.v_proj.v_scale",
        f"{LINEAR}.act_quant.scale",
    ]
    rewrite(copy, lambda tensors: tensors.update(dict.fromkeys(names, torch.ones(1))))
    planned = plan(copy, tmp_path, base_quantization="none")
    assert all(planned.by_name[name].copied for name in names)


def test_integers_that_the_model_takes_as_such_go_on(tmp_path):
    base = build_qwen2(tmp_path / "qwen2", tokenizer=False)
    rewrite(base, lambda tensors: tensors.update({"model.rotary_emb.num_batches_tracked": torch.tensor(3)}))
    assert plan(base, tmp_path, dtype="float32").by_name["model.rotary_emb.num_batches_tracked"].copied


def test_the_page_shows_how_plain_weights_are_made_of_codes(tmp_path, monkeypatch):
    base = build_llama(tmp_path / "base", hidden_size=128, intermediate_size=256, tie_word_embeddings=True)
    exact = {}

    def quantize(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            scale = tensors[name].double().abs().max() / 448
            codes = (tensors[name].double() / scale).to(FP8)
            num_blocks = [-(-size // 128) for size in codes.shape]
            exact[name] = (codes.double() * scale.float().double()).to(torch.bfloat16)
            tensors.update({name: codes, f"{name}_scale_inv": torch.full(num_blocks, float(scale))})

    rewrite(base, quantize)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (base / "config.json").write_text(json.dumps(config))
    page = (Path(__file__).parents[2] / "docs" / "stored-forms.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})  # as people do
    made = load_file(tmp_path / "base-16-bit" / "model.safetensors")
    assert exact
    assert all(torch.equal(made[name], expected) for name, expected in exact.items())
    assert (tmp_path / "base-16-bit" / "tokenizer.json").exists()
    assert plan(tmp_path / "base-16-bit", tmp_path).by_name.keys() == made.keys()


def test_a_dtype_that_safetensors_does_not_know_is_named(copy):
    add(copy / "model.safetensors", {"a.new": ("F12", [2], b"abc")})
    with pytest.raises(BadInputError, match=r"a\.new: dtype 'F12' is unknown to safetensors"):
        read_checkpoint(copy)
