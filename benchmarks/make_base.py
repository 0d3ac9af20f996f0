"""Writes a random base of a common model's shape, and four LoRA adapters for it.

Usage: python -m benchmarks.make_base SHAPE DIRECTORY

    DIRECTORY/base                      bf16 safetensors in shards of at most 1 GB, config, index
    DIRECTORY/adapters/r16-all ...      saved by PEFT

The weights are random: good for speed and arithmetic, meaningless as a language model. Shards are made one at a time,
so memory stays that of one, and each tensor has its own seed, so the bytes do not depend on the order.
"""

import argparse
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

MAX_SHARD_BYTES = 10**9

SHAPES: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "1.1b": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "13b": LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
}

ADAPTERS: dict[str, tuple[int, str | list[str]]] = {
    "r16-all": (16, "all-linear"),
    "r16-qv": (16, ["q_proj", "v_proj"]),
    "r64-all": (64, "all-linear"),
    "r8-all": (8, "all-linear"),
}
"""Rank and target modules by name."""


def make_base(shape: str, directory: Path, device: str = "cpu") -> None:
    """Write the base of one shape; what is there already is overwritten.

    Args:
        shape: a key of `SHAPES`.
        directory: becomes the checkpoint.
        device: draws the random numbers; another one draws others.
    """
    config = SHAPES[shape]
    model = _weightless(config)
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    parameters = dict(model.named_parameters())  # tied ones once, as save_pretrained keeps them
    shards = _shards(parameters)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shapes = {name: parameters[name].shape for name in names}
        _write_shard(directory / file_name, shapes, config.initializer_range, device)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_num_bytes, parameters.values()))}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def make_adapter(shape: str, name: str, directory: Path, base: Path, seed: int = 0) -> None:
    """Write one adapter as PEFT saves it: float32, A uniform as PEFT starts it, B normal instead of zero.

    Args:
        shape: a key of `SHAPES`.
        name: a key of `ADAPTERS`.
        directory: becomes the adapter.
        base: the base it says it was trained on.
        seed: adapters of one name and different seeds have different weights.
    """
    rank, target_modules = ADAPTERS[name]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_modules, task_type="CAUSAL_LM")
    weightless = _weightless(SHAPES[shape])
    weightless.name_or_path = str(base)  # PEFT records it
    model = get_peft_model(weightless, config)
    state = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        generator = _generator(f"{name}/{seed}/{key}")
        value = torch.empty(parameter.shape)
        if "lora_B" in key:
            value.normal_(std=0.01, generator=generator)
        else:
            bound = value.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)), as in peft/tuners/lora/layer.py 0.21
            value.uniform_(-bound, bound, generator=generator)
        state[key] = value
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)


def _weightless(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _generator(name: str, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def _shards(parameters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Fill shards in the model's own order, none above `MAX_SHARD_BYTES` unless one tensor is."""
    shards: list[list[str]] = [[]]
    room = MAX_SHARD_BYTES
    for name, parameter in parameters.items():
        if shards[-1] and _num_bytes(parameter) > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= _num_bytes(parameter)
    return shards


def _write_shard(path: Path, shapes: Mapping[str, torch.Size], std: float, device: str) -> None:
    """Write one bf16 safetensors file: 8 bytes of header length, the header, then the tensors without gaps."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(shapes):
        starts[name], end = end, end + 2 * shapes[name].numel()
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header_bytes = struct.pack("<Q", len(text)) + text

    def write(name: str) -> None:
        weight = _random_weight(name, shapes[name], std, device)
        data, offset = memoryview(weight.view(-1).view(torch.uint8).numpy()), len(header_bytes) + starts[name]
        while data:
            num_written = os.pwrite(file.fileno(), data, offset)
            data, offset = data[num_written:], offset + num_written

    with path.open("wb", buffering=0) as file, ThreadPoolExecutor() as pool:
        file.write(header_bytes)
        list(pool.map(write, shapes))


def _random_weight(name: str, shape: Iterable[int], std: float, device: str) -> torch.Tensor:
    """Return a bf16 tensor [*shape] on the CPU: norms near one, all else normal around zero."""
    weight = torch.empty(torch.Size(shape), dtype=torch.bfloat16, device=device)
    weight.normal_(std=std, generator=_generator(name, device))
    return (weight.add_(1.0) if "norm" in name else weight).cpu()


def main() -> None:
    """Write the base and the adapters named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    base = arguments.directory / "base"
    make_base(arguments.shape, base)
    for name in ADAPTERS:
        make_adapter(arguments.shape, name, arguments.directory / "adapters" / name, base)


if __name__ == "__main__":
    main()
