"""Bases in 4 bits by bitsandbytes, as transformers saves them: what they stand for is what bitsandbytes dequantizes."""

import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file

from tests.models import build_bnb_4bit
from tests.stored import twin_of
from workers.bases.four_bit import quantized_names


def store_4bit(base: Path, directory: Path) -> Path:
    """Store the linear weights of a base in NF4, through transformers; its twin lies beside it, as of `store`.

    Args:
        base: in 16 bits, in one file.
        directory: becomes the base in NF4.
    """
    build_bnb_4bit(base, directory)
    stored = load_file(directory / "model.safetensors")
    numbers = load_file(base / "model.safetensors")
    for name in quantized_names(stored):
        parts = {part.removeprefix(f"{name}."): stored[part] for part in stored if part.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        # One block a row: across rows, the kernel for AVX-512 takes the scales of others.
        blocks = bnb.dequantize_4bit(stored[name].view(-1, 1), state.__class__(**_flat(state)))
        numbers[name] = blocks.view(state.shape)
    twin = twin_of(directory)
    shutil.copytree(base, twin)
    save_file(numbers, twin / "model.safetensors", metadata={"format": "pt"})
    return directory


def _flat(state: bnb.QuantState) -> dict[str, object]:
    return {
        "absmax": state.absmax,
        "shape": torch.Size((state.absmax.numel(), state.blocksize)),
        "code": state.code,
        "blocksize": state.blocksize,
        "quant_type": state.quant_type,
        "dtype": state.dtype,
    }
