"""Adapters of PEFT written as other trainers have them, by what each trainer's own code says of its layout."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
_TUNE = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}


def read_peft(adapter: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return what was trained, without PEFT's prefix, and the configuration."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if ".base_layer." not in name}
    return own, config


def write_mlx(
    adapter: Path, directory: Path, *, num_layers: int = -1, config: Mapping[str, Any] | None = None, **parameters: Any
) -> Path:
    """Write an adapter of PEFT as mlx_lm 0.32 does: y = x W' + scale (x A) B with A [I, R], B [R, O].

    Args:
        adapter: of PEFT, on linears and embeddings.
        directory: becomes the adapter of MLX.
        num_layers: that were trained, from the end.
        config: further fields.
        parameters: further fields of lora_parameters.
    """
    tensors, peft = read_peft(adapter)
    saved = {}
    for name, tensor in tensors.items():
        if name.endswith("lora_magnitude_vector"):
            saved[name.replace(".lora_magnitude_vector", ".m")] = tensor
        else:
            plain = name.removesuffix(".weight")
            for old, new in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
                plain = plain.replace(f"lora_embedding_{old[-1]}", new).replace(old, new)
            saved[plain] = tensor.T.contiguous()
    fields = {
        "fine_tune_type": "dora" if peft["use_dora"] else "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": peft["r"], "dropout": 0.0, "scale": peft["lora_alpha"] / peft["r"]} | parameters,
    }
    of_training = {"adapter_path": "adapters", "batch_size": 4, "iters": 1000, "learning_rate": 1e-5, "train": True}
    fields |= of_training | {"model": "/models/tiny", "optimizer": "adam", "lr_schedule": None, "config": None}
    directory.mkdir()
    save_file(saved, directory / "adapters.safetensors", metadata={"format": "mlx"})
    save_file(saved, directory / "0000100_adapters.safetensors", metadata={"format": "mlx"})
    (directory / "adapter_config.json").write_text(json.dumps(fields | dict(config or {})))
    return directory


def write_torchtune(
    adapter: Path, directory: Path, name: str = "adapter_model.pt", *, heads: Mapping[str, int], head_dim: int
) -> Path:
    """Write an adapter of PEFT as torchtune 0.6 keeps it for itself, with the configuration that it writes for PEFT.

    Args:
        adapter: of PEFT.
        directory: becomes the adapter of torchtune.
        name: of its file.
        heads: number of heads by the last part of a module's name, for those whose rows are in `hf_to_tune`'s order.
        head_dim: of these.
    """
    tensors, peft = read_peft(adapter)
    saved = {}
    for stored, tensor in tensors.items():
        module, _, rest = stored.partition(".lora_")
        parts, leaf = module.split("."), module.rpartition(".")[2]
        own = "output" if module == "lm_head" else f"layers.{parts[2]}.{_TUNE['.'.join(parts[3:])]}"
        ends = {"A.weight": "lora_a.weight", "B.weight": "lora_b.weight", "magnitude_vector": "magnitude"}
        moved = tensor
        if leaf in heads and rest != "A.weight":  # `_permute` of hf_to_tune
            moved = tensor.reshape(heads[leaf], 2, head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        saved[f"{own}.{ends[rest]}"] = moved.contiguous()
    fields = {
        name: peft[name] for name in ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path")
    }
    directory.mkdir()
    torch.save(saved, directory / name)
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def write_tinker(
    adapter: Path,
    directory: Path,
    config: Mapping[str, Any] | None = None,
    *,
    shared: Callable[[str], object] | None = None,
) -> Path:
    """Write an adapter of PEFT as Tinker does: unembed_tokens, and stacks of experts.

    Args:
        adapter: of PEFT.
        directory: becomes the adapter of Tinker.
        config: further fields.
        shared: whether a stack, by its name, has one matrix for all experts; that of the first one is taken.
    """
    tensors, peft = read_peft(adapter)
    saved: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            saved[f"{PREFIX}{name.replace('lm_head', 'model.unembed_tokens')}"] = tensor
            continue
        place, _, rest = name.partition(".experts.")
        number, projection, half = rest.split(".", 2)
        own = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[projection]
        stacks.setdefault(f"{PREFIX}{place}.experts.{own}.{half}", {})[int(number)] = tensor
    for name, by_number in stacks.items():
        stack = torch.stack([by_number[number] for number in range(len(by_number))])
        saved[name] = stack[:1].clone() if shared is not None and shared(name) else stack
    directory.mkdir()
    save_file(saved, directory / "adapter_model.safetensors")
    fields = {"r": peft["r"], "lora_alpha": peft["lora_alpha"]} | dict(config or {})
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory
