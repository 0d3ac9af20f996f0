"""Bases stored in other forms, in the layouts they are published in; and what their weights are as numbers."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Takes = Callable[[str, torch.Tensor], bool]
"""Says of a weight whether it is stored in the form."""
Quantized = tuple[dict[str, torch.Tensor], torch.Tensor]
"""What a weight is stored as, by name, and the numbers that stands for."""


def store(
    base: Path,
    directory: Path,
    quantize: Callable[[str, torch.Tensor], Quantized],
    declared: Mapping[str, Any],
    *,
    takes: Takes,
    apart: Callable[[str], bool] | None = None,
) -> Path:
    """Store weights of a base in a form.

    Args:
        base: in 16 bits, in one file.
        directory: becomes the base in the form; beside it, as `<directory>-twin`, its weights as numbers in 16 bits.
        quantize: returns a weight, by its name, in the form.
        declared: what `config.json` says of it.
        takes: which weights are stored in it.
        apart: says of a stored tensor's name whether it lies in a shard of its own.
    """
    twin = twin_of(directory)
    for copy in (directory, twin):
        shutil.copytree(base, copy)
    stored: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if takes(name, weight):
            parts, numbers[name] = quantize(name, weight)
            stored |= parts
        else:
            stored[name] = numbers[name] = weight
    save_file(numbers, twin / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    if apart is None:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    (directory / "model.safetensors").unlink()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        files.setdefault(f"model-0000{2 if apart(name) else 1}-of-00002.safetensors", {})[name] = tensor
    for file, held in files.items():
        save_file(held, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def twin_of(stored: Path) -> Path:
    """Return the base whose weights are the numbers of one in a form."""
    return stored.with_name(f"{stored.name}-twin")


def is_linear(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight is that of a projection."""
    return "proj" in name and name.endswith(".weight") and weight.dim() == 2
