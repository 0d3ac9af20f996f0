"""Checkpoints broken in one way each, after what people report of engines: what is done, and the rule it is against.

Public threads that they are modelled after stand with the rules (`source`). Each takes a good release and breaks it in
place.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Change = Callable[[dict[str, torch.Tensor]], None]


def edit(directory: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    document = json.loads((directory / name).read_text())
    change(document)
    (directory / name).write_text(json.dumps(document))


def fields(name: str = "config.json", **values: Any) -> Callable[[Path], None]:
    """Return a fault that sets fields of a JSON file; None takes them away."""

    def change(document: dict[str, Any]) -> None:
        for field, value in values.items():
            if value is None:
                document.pop(field, None)
            else:
                document[field] = value

    return lambda directory: edit(directory, name, change)


def tensors(change: Change) -> Callable[[Path], None]:
    """Return a fault that changes the tensors of a checkpoint of one file."""

    def apply(directory: Path) -> None:
        stored = load_file(directory / SINGLE)
        change(stored)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / SINGLE, {"format": "pt"})

    return apply


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    """Return a fault that renames tensors."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            stored[rename(name)] = stored.pop(name)

    return tensors(change)


def dropped(*parts: str) -> Callable[[Path], None]:
    """Return a fault that removes the tensors whose names hold one of some texts."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        found = [name for name in stored if any(part in name for part in parts)]
        assert found
        for name in found:
            del stored[name]

    return tensors(change)


def added(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    """Return a fault that adds a tensor."""
    return tensors(lambda stored: stored.__setitem__(name, tensor))


def reshaped(name: str, *shape: int) -> Callable[[Path], None]:
    """Return a fault that gives a tensor another shape."""
    return tensors(lambda stored: stored.__setitem__(name, torch.zeros(shape, dtype=stored[name].dtype)))


def file(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return a fault that writes a file."""

    def write(directory: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (directory / name).write_bytes(data)

    return write


def gone(*names: str) -> Callable[[Path], None]:
    """Return a fault that removes files."""

    def remove(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return remove


def both(*faults: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return several changes as one fault."""

    def apply(directory: Path) -> None:
        for fault in faults:
            fault(directory)

    return apply


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def _move_in_index(directory: Path) -> None:
    first, last = (path.name for path in (_shards(directory)[0], _shards(directory)[-1]))
    edit(
        directory,
        INDEX,
        lambda index: index["weight_map"].update(
            {next(name for name, shard in index["weight_map"].items() if shard == first): last}
        ),
    )


def _copy_into_last(directory: Path) -> None:
    first, last = _shards(directory)[0], _shards(directory)[-1]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor}, last, {"format": "pt"})


def _one_more_in_shard(directory: Path) -> None:
    last = _shards(directory)[-1]
    save_file(load_file(last) | {"model.layers.0.extra.weight": torch.zeros(4)}, last, {"format": "pt"})


def _one_less_in_shard(directory: Path) -> None:
    last = _shards(directory)[-1]
    stored = load_file(last)
    stored.pop(next(iter(sorted(stored))))
    save_file(stored, last, {"format": "pt"})


def _all_in_one(directory: Path) -> None:
    stored: dict[str, torch.Tensor] = {}
    for path in _shards(directory):
        stored |= load_file(path)
    save_file(stored, directory / SINGLE, {"format": "pt"})


def _stale_index(directory: Path) -> None:
    _all_in_one(directory)
    for path in _shards(directory):
        path.unlink()


def _old_shard(directory: Path) -> None:
    save_file({"model.old.weight": torch.zeros(4)}, directory / "model-00007-of-00007.safetensors", {"format": "pt"})


def _cut(directory: Path) -> None:
    data = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(data[:-100])


def _header_of_nothing(directory: Path) -> None:
    (directory / SINGLE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def _fuse_qkv(stored: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        front = f"model.layers.{layer}.self_attn."
        parts = [stored.pop(f"{front}{part}_proj.weight") for part in "qkv"]
        stored[f"{front}qkv_proj.weight"] = torch.cat(parts)


def _split_qkv(stored: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        front = f"model.layers.{layer}.self_attn."
        fused = stored.pop(f"{front}qkv_proj.weight")
        for part, rows in zip("qkv", fused.split([64, 32, 32]), strict=True):
            stored[f"{front}{part}_proj.weight"] = rows.clone()


def _lora_beside(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if "q_proj.weight" in name]:
        front = name.removesuffix("weight")
        stored[f"{front}base_layer.weight"] = stored.pop(name)
        stored[f"{front}lora_A.default.weight"] = torch.zeros(2, 64)
        stored[f"{front}lora_B.default.weight"] = torch.zeros(64, 2)


def _fuse_gate_up(stored: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        front = f"model.layers.{layer}.mlp."
        parts = [stored.pop(f"{front}{part}_proj.weight") for part in ("gate", "up")]
        stored[f"{front}gate_up_proj.weight"] = torch.cat(parts)


def _split_experts(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if ".experts." in name]:
        front, _, part = name.partition(".experts.")
        for number, weight in enumerate(stored.pop(name)):
            pieces = {part: weight}
            if part.startswith("gate_up"):
                ending = part.removeprefix("gate_up")
                pieces = {f"gate{ending}": weight[..., ::2], f"up{ending}": weight[..., 1::2]}
            for piece, values in pieces.items():
                called = piece.replace("_bias", ".bias") if piece.endswith("_bias") else f"{piece}.weight"
                stored[f"{front}.experts.{number}.{called}"] = values.contiguous()


def _all_as_fp8(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if "proj.weight" in name]:
        stored[name] = stored[name].to(torch.float8_e4m3fn)


def _fused_experts(stored: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        front = f"model.layers.{layer}.mlp.experts."
        own = [name for name in stored if name.startswith(front)]
        parts = {name.removeprefix(front): stored.pop(name) for name in own}
        gates = [torch.cat([parts[f"{n}.gate_proj.weight"], parts[f"{n}.up_proj.weight"]]) for n in range(4)]
        stored[f"{front}gate_up_proj"] = torch.stack(gates)
        stored[f"{front}down_proj"] = torch.stack([parts[f"{n}.down_proj.weight"] for n in range(4)])


def _new_token(id_: int, content: str, *, special: bool = True) -> Callable[[Path], None]:
    token = {"id": id_, "content": content, "special": special, "single_word": False, "lstrip": False}
    token |= {"rstrip": False, "normalized": False}
    return lambda directory: edit(directory, "tokenizer.json", lambda it: it["added_tokens"].append(token))


def _slow_only(directory: Path) -> None:
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "tokenizer.json").unlink()


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}


def _cut_gguf(directory: Path) -> None:
    path = next(directory.glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:-4096])


def _cut_front(directory: Path) -> None:
    path = next(directory.glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:2000])


def _gguf(
    leave_out: str = "", value: tuple[str, int] | None = None, kind: tuple[str, int] | None = None
) -> Callable[[Path], None]:
    """Write a GGUF file anew by the `gguf` package: without a tensor, or with another number in its metadata.

    Args:
        leave_out: name of the tensor.
        value: a field, and what it says then.
        kind: a tensor, and the number of another type.
    """

    def write(directory: Path) -> None:
        path = next(directory.glob("*.gguf"))
        reader = GGUFReader(path)
        writer = GGUFWriter(directory / "new.gguf", reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            said = value[1] if value is not None and value[0] == name else field.contents()
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, said, field.types[0], sub_type=inner)
        for tensor in reader.tensors:
            if tensor.name != leave_out:
                raw = tensor.tensor_type if kind is None or kind[0] != tensor.name else kind[1]
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
                if raw is not tensor.tensor_type:
                    writer.tensors[-1][tensor.name].dtype = raw
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (directory / "new.gguf").rename(path)

    return write


FAULTS: Mapping[str, tuple[str, str, Callable[[Path], object]]] = {
    # GGUF
    "a GGUF file beside nothing else": ("gguf", "gguf.alone", lambda _: None),
    "a GGUF file that is cut short": ("gguf", "gguf.truncated", _cut_gguf),
    "a GGUF file cut within its metadata": ("gguf", "files.unreadable", _cut_front),
    "a GGUF file without a tensor of a block": ("gguf", "gguf.missing", _gguf(leave_out="blk.1.ffn_up.weight")),
    "a GGUF file without its last norm": ("gguf", "gguf.missing", _gguf(leave_out="output_norm.weight")),
    "a GGUF file of other heads": (
        "gguf",
        "gguf.disagrees",
        both(_gguf(value=("llama.attention.head_count_kv", 4)), fields(num_key_value_heads=4)),
    ),
    "a GGUF file with tokens of another vocabulary": (
        "gguf",
        "gguf.disagrees",
        both(_gguf(value=("llama.vocab_size", 400)), fields(vocab_size=400)),
    ),
    "a GGUF file with a type that nothing knows": ("gguf", "gguf.unknown-type", _gguf(kind=("output.weight", 99))),
    "a GGUF file of another model": ("gguf", "gguf.not-the-config", fields(intermediate_size=256)),
    # Files
    "no config.json": ("llama", "files.no-config", gone("config.json")),
    "no weights": ("llama", "files.no-weights", gone(SINGLE)),
    "weights as a pickle": ("llama", "files.pickled", both(gone(SINGLE), file("pytorch_model.bin", b"PK"))),
    "a download that broke off": ("llama", "files.unreadable", _cut),
    "a header beyond the file": ("llama", "files.unreadable", _header_of_nothing),
    "a pointer of git-lfs": (
        "llama",
        "files.unreadable",
        file(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    ),
    "tokenizer.json as a pointer of git-lfs": (
        "llama",
        "files.unreadable",
        file("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
    ),
    "tokenizer.json cut off": ("llama", "files.unreadable", file("tokenizer.json", '{"version": ')),
    "generation_config.json that is a list": ("llama", "files.unreadable", file("generation_config.json", "[]")),
    "config.json cut off": ("llama", "files.unreadable", file("config.json", '{"model_type": ')),
    "shards without their index": ("sharded", "files.no-index", gone(INDEX)),
    "the old single file beside new shards": ("sharded", "files.two-checkpoints", _all_in_one),
    "a shard of an older save": ("sharded", "files.stray-weights", _old_shard),
    "other safetensors beside a single file": ("llama", "files.stray-weights", _old_shard),
    "the adapter beside its merge": (
        "llama",
        "files.adapter-beside",
        both(file("adapter_config.json", '{"peft_type": "LORA"}'), file("adapter_model.bin", b"x")),
    ),
    "the adapter's configuration beside its merge": (
        "llama",
        "files.adapter-beside",
        file("adapter_config.json", '{"peft_type": "LORA"}'),
    ),
    # Index
    "an index without files": ("sharded", "index.no-map", fields(INDEX, weight_map={})),
    "a shard not uploaded": ("sharded", "index.no-shard", lambda it: _shards(it)[1].unlink()),
    "an index left beside a single file": ("sharded", "index.left-behind", _stale_index),
    "a tensor that only the index has": ("sharded", "index.not-in-shard", _one_less_in_shard),
    "a tensor that the index lacks": ("sharded", "index.not-in-index", _one_more_in_shard),
    "a tensor in another shard": ("sharded", "index.wrong-shard", _move_in_index),
    "a tensor in two shards": ("sharded", "index.in-two-shards", _copy_into_last),
    "a total_size from elsewhere": (
        "sharded",
        "index.total-size",
        lambda it: edit(it, INDEX, lambda index: index["metadata"].update(total_size=12345)),
    ),
    # Names
    "saved as a PeftModel": ("llama", "names.left-of-peft", renamed(lambda name: f"base_model.model.{name}")),
    "saved with its adapter unmerged": ("llama", "names.left-of-peft", tensors(_lora_beside)),
    "a base_layer left by unwrapping": (
        "qwen2",
        "names.left-of-peft",
        renamed(lambda name: name.replace("o_proj.weight", "o_proj.base_layer.weight")),
    ),
    "modules_to_save left": (
        "llama",
        "names.left-of-peft",
        renamed(lambda name: name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")),
    ),
    "saved from torch.compile": ("llama", "names.wrapped", renamed(lambda name: f"_orig_mod.{name}")),
    "compiled block by block": (
        "llama",
        "names.wrapped",
        renamed(lambda name: name.replace("layers.1.", "layers.1._orig_mod.")),
    ),
    "saved from DDP": ("qwen2", "names.wrapped", renamed(lambda name: f"module.{name}")),
    "saved from FSDP": (
        "llama",
        "names.wrapped",
        renamed(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
    ),
    "a prefix put on twice": (
        "llama",
        "names.prefix-twice",
        renamed(lambda name: f"model.{name}" if name.startswith("model.") else name),
    ),
    "the prefix of a part put on twice": (
        "llava",
        "names.prefix-twice",
        renamed(lambda name: f"language_model.{name}" if name.startswith("language_model.") else name),
    ),
    # Tensors
    "a tensor forgotten": ("llama", "tensors.missing", dropped("layers.1.mlp.up_proj")),
    "norms forgotten": ("qwen2", "tensors.missing", dropped("input_layernorm")),
    "an expert forgotten": ("qwen3_moe", "tensors.missing", dropped("layers.0.mlp.experts.1.")),
    "one projection of an expert forgotten": ("qwen3_moe", "tensors.missing", dropped("experts.3.down_proj")),
    "an encoder without a block's output": ("bert", "tensors.missing", dropped("layer.1.output.dense.weight")),
    "a tensor of another model": (
        "llama",
        "tensors.unexpected",
        added("model.layers.0.self_attn.q_norm.weight", torch.ones(16, dtype=torch.bfloat16)),
    ),
    "biases that the class has not": (
        "llama",
        "tensors.unexpected",
        added("model.layers.0.self_attn.q_proj.bias", torch.zeros(64, dtype=torch.bfloat16)),
    ),
    "a head of the pretraining left": (
        "bert",
        "tensors.unused",
        added("cls.seq_relationship.weight", torch.zeros(2, 64, dtype=torch.bfloat16)),
    ),
    "q, k and v fused": ("llama", "tensors.fused", tensors(_fuse_qkv)),
    "q, k and v split": ("phi3", "tensors.split", tensors(_split_qkv)),
    "gate and up fused": ("qwen2", "tensors.fused", tensors(_fuse_gate_up)),
    "experts one by one": ("gpt_oss", "tensors.split", tensors(_split_experts)),
    "experts as transformers 5 has them": ("qwen3_moe", "tensors.fused-experts", tensors(_fused_experts)),
    "more layers configured than stored": (
        "llama",
        "tensors.layers",
        both(fields(num_hidden_layers=4)),
    ),
    "fewer layers configured than stored": ("llama", "tensors.layers", fields(num_hidden_layers=1)),
    "the last layer not saved": ("qwen2", "tensors.layers", dropped("layers.1.")),
    "vocab_size of the base after resizing": ("llama", "tensors.vocabulary", fields(vocab_size=640)),
    "an encoder with another vocabulary": ("bert", "tensors.vocabulary", fields(vocab_size=130)),
    "a head not resized with its embedding": (
        "llama",
        "tensors.vocabulary",
        reshaped("model.embed_tokens.weight", 520, 64),
    ),
    "another hidden_size": ("llama", "tensors.shape", fields(hidden_size=128, head_dim=16)),
    "another intermediate_size": ("qwen2", "tensors.shape", fields(intermediate_size=256)),
    "other key-value heads": ("llama", "tensors.shape", fields(num_key_value_heads=4)),
    "other experts": ("qwen3_moe", "tensors.shape", fields(num_local_experts=8)),
    "a projection transposed": ("llama", "tensors.shape", reshaped("model.layers.0.mlp.down_proj.weight", 192, 64)),
    "untied without a head": ("qwen2", "tensors.no-head", fields(tie_word_embeddings=False)),
    "a head dropped": ("llama", "tensors.no-head", dropped("lm_head")),
    "tied with a head of its own": ("llama", "tensors.tied-head", fields(tie_word_embeddings=True)),
    "a weight under two names": (
        "llama",
        "tensors.twice",
        added("norm.weight", torch.ones(64, dtype=torch.bfloat16)),
    ),
    # Codes
    "bitsandbytes left in config.json": ("llama", "quantization.declared-plain", fields(quantization_config=BNB)),
    "FP8 left in config.json": ("qwen2", "quantization.declared-plain", fields(quantization_config=FP8)),
    "GPTQ left in config.json": (
        "llama",
        "quantization.declared-plain",
        fields(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
    ),
    "FP8 cast without scales": ("llama", "quantization.undeclared", tensors(_all_as_fp8)),
    "FP8 without its declaration": ("fp8", "quantization.undeclared", fields(quantization_config=None)),
    "bnb-4bit without its declaration": ("bnb", "quantization.undeclared", fields(quantization_config=None)),
    "AWQ without its declaration": ("awq", "quantization.undeclared", fields(quantization_config=None)),
    "scales of FP8 lost": ("fp8", "quantization.no-scales", dropped("layers.0.self_attn.q_proj.weight_scale_inv")),
    "scales of AWQ lost": ("awq", "quantization.no-scales", dropped("layers.0.mlp.up_proj.scales")),
    "scales of bnb-4bit lost": ("bnb", "quantization.no-scales", dropped("layers.0.mlp.up_proj.weight.")),
    "scales left by dequantizing": (
        "llama",
        "quantization.orphan-scales",
        added("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(2, 1)),
    ),
    "states of 4 bits left by dequantizing": (
        "qwen2",
        "quantization.orphan-scales",
        added("model.layers.0.mlp.up_proj.weight.absmax", torch.ones(12)),
    ),
    "another block size declared": (
        "fp8",
        "quantization.disorder",
        fields(quantization_config=FP8 | {"weight_block_size": [32, 32]}),
    ),
    # Dtypes
    "float32 declared": ("llama", "dtype.disagrees", fields(dtype="float32", torch_dtype="float32")),
    "float16 declared": ("qwen2", "dtype.disagrees", fields(dtype=None, torch_dtype="float16")),
    "no dtype at all": ("llama", "dtype.unknown", fields(dtype="bf16", torch_dtype="bf16")),
    "two dtypes": ("llama", "dtype.fields-differ", fields(torch_dtype="float16")),
    "the old dtype field away": ("llama", "dtype.new-field", fields(torch_dtype=None)),
    "the dtype away": ("llama", "dtype.absent", fields(dtype=None, torch_dtype=None)),
    # Tokenizer
    "no tokenizer": ("llama", "tokenizer.missing", gone("tokenizer.json", "tokenizer_config.json")),
    "a special token added without a row": ("llama", "tokenizer.few-rows", _new_token(600, "<extra>")),
    "a token of the template without a row": (
        "llama",
        "tokenizer.no-rows",
        both(_new_token(600, "<|turn|>"), file("chat_template.jinja", "<|turn|>{{ messages[0]['content'] }}")),
    ),
    "a class of transformers 5": (
        "llama",
        "tokenizer.new-class",
        fields("tokenizer_config.json", tokenizer_class="TokenizersBackend"),
    ),
    "special tokens as a list": (
        "llama",
        "tokenizer.new-list",
        fields("tokenizer_config.json", extra_special_tokens=["<|end|>"]),
    ),
    "a slow tokenizer alone": ("llama", "tokenizer.slow-only", _slow_only),
    "added tokens of another save": ("llama", "tokenizer.added-differ", file("added_tokens.json", '{"<|end|>": 7}')),
    "an eos token that is not there": (
        "llama",
        "tokenizer.no-such-token",
        fields("tokenizer_config.json", pad_token="<|pad|>"),
    ),
    "no special tokens": (
        "llama",
        "tokenizer.no-roles",
        fields("tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None),
    ),
    # Templates
    "a template that does not parse": (
        "llama",
        "template.broken",
        file("chat_template.jinja", "{% for m in messages %}{{ m['content'] }"),
    ),
    "a template with a loop that does not end": (
        "llama",
        "template.broken",
        file("chat_template.jinja", "{% for m in messages %}{{ m['content'] }}"),
    ),
    "a chat model without its template": (
        "llama",
        "template.missing",
        both(gone("chat_template.jinja"), _new_token(450, "<|im_start|>")),
    ),
    "a template in its own file": ("llama", "template.own-file", fields("tokenizer_config.json", chat_template=None)),
    "two templates": ("llama", "template.differ", fields("tokenizer_config.json", chat_template="{{ messages }}")),
    # Generation
    "a generation configuration of nonsense": (
        "llama",
        "generation.invalid",
        fields("generation_config.json", max_new_tokens=-1),
    ),
    "sequences that greedy search has not": (
        "llama",
        "generation.invalid",
        fields("generation_config.json", num_return_sequences=3, do_sample=None),
    ),
    "temperature without sampling": (
        "llama",
        "generation.unsavable",
        fields("generation_config.json", temperature=0.7, top_p=0.9, do_sample=False),
    ),
    "an end that the tokenizer has not": (
        "llama",
        "generation.no-such-stop",
        both(fields("generation_config.json", eos_token_id=490), fields(eos_token_id=490)),
    ),
    "another end than the tokenizer's": (
        "llama",
        "generation.goes-on",
        both(fields("generation_config.json", eos_token_id=5), fields(eos_token_id=5)),
    ),
    "two ends": ("llama", "generation.stops-differ", fields(eos_token_id=5)),
    # Configuration
    "no model_type": ("llama", "config.no-model-type", fields(model_type=None)),
    "a model_type of nobody": ("llama", "config.unknown-model-type", fields(model_type="llamma")),
    "no architectures": ("llama", "config.no-architectures", fields(architectures=None)),
    "the class of PEFT": ("llama", "config.unknown-architecture", fields(architectures=["PeftModelForCausalLM"])),
    "an activation of nobody": ("llama", "config.unbuildable", fields(hidden_act="siluu")),
    "code that was not shipped": (
        "llama",
        "config.no-code",
        fields(
            model_type="own",
            architectures=["OwnForCausalLM"],
            auto_map={"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
        ),
    ),
    "layer types of another depth": ("qwen2", "config.layer-types", fields(layer_types=["full_attention"] * 5)),
    "heads that do not divide": ("llama", "config.heads", fields(num_key_value_heads=3)),
    "scaling of positions without its kind": (
        "llama",
        "config.rope-type",
        fields(rope_parameters=None, rope_scaling=YARN, rope_theta=10000.0),
    ),
    "two scalings of positions": (
        "llama",
        "config.rope-differ",
        both(
            fields(rope_parameters=YARN | {"rope_type": "yarn", "rope_theta": 10000.0}),
            fields(rope_scaling=YARN | {"rope_type": "yarn", "factor": 2.0}),
        ),
    ),
    "padding beyond the vocabulary": ("llama", "config.token-id", fields(pad_token_id=512)),
    "no version": ("llama", "config.no-version", fields(transformers_version=None)),
    "a family that is not imported": ("bert", "bedrock.architecture", lambda _: None),
    "a tokenizer that is not imported": (
        "llama",
        "bedrock.tokenizer",
        fields("tokenizer_config.json", tokenizer_class="GemmaTokenizer"),
    ),
    "a tokenizer without its configuration": ("llama", "bedrock.files", gone("tokenizer_config.json")),
}
"""By what was done: to which good release, the rule, and how."""
