"""Bases of ModelOpt: what they stand for are products in float32, rounded once."""

import json
from pathlib import Path
from typing import Literal

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme

from tests.stored import Quantized, is_linear, store
from tests.stored.compressed import FORMATS, compress

Of = Literal["fp8", "fp8 by channel", "nvfp4"]
_ALGORITHMS = {"fp8": "FP8", "fp8 by channel": "FP8_PER_CHANNEL_PER_TOKEN", "nvfp4": "NVFP4"}


def store_modelopt(base: Path, directory: Path, of: Of, *, declared_in: Literal["config", "file", "both"]) -> Path:
    """Store the linear weights of a base as ModelOpt exports them; see `store`.

    Args:
        base: in 16 bits, in one file.
        directory: becomes the base in that form.
        of: its format.
        declared_in: whether `config.json` says so, `hf_quant_config.json`, or both.
    """
    declared = {"quant_method": "modelopt", "quant_algo": _ALGORITHMS[of], "ignore": ["lm_head"]}
    quantize = _nvfp4 if of == "nvfp4" else (lambda name, weight: _fp8(name, weight, by_row="channel" in of))
    store(base, directory, quantize, declared, takes=is_linear)
    if declared_in != "config":
        content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": _ALGORITHMS[of]}}
        (directory / "hf_quant_config.json").write_text(json.dumps(content))
    if declared_in == "file":
        config = json.loads((directory / "config.json").read_text())
        del config["quantization_config"]
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def _fp8(name: str, weight: torch.Tensor, *, by_row: bool) -> Quantized:
    largest = weight.float().abs().amax(1) if by_row else weight.float().abs().max()
    scales = largest / 448
    spread = scales[:, None] if by_row else scales
    codes = (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    module = name.removesuffix("weight")
    stored = {name: codes, f"{module}weight_scale": scales, f"{module}input_scale": torch.ones(())}
    return stored, (codes.float() * spread).to(weight.dtype)


def _nvfp4(name: str, weight: torch.Tensor) -> Quantized:
    format_, arguments = FORMATS["nvfp4"]
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": dict(arguments)})
    parts, _ = compress(name, weight, format_, scheme)
    module = name.removesuffix("weight")
    stored = {
        name: parts[f"{module}weight_packed"],
        f"{module}weight_scale": parts[f"{module}weight_scale"],
        f"{module}weight_scale_2": (1 / parts[f"{module}weight_global_scale"]).reshape(()),
        f"{module}input_scale": torch.ones(()),
    }
    scales = stored[f"{module}weight_scale"].float() * stored[f"{module}weight_scale_2"]
    codes = unpack_fp4_from_uint8(stored[name], *weight.shape, dtype=torch.float32)
    return stored, (codes.unflatten(1, (-1, 16)) * scales[..., None]).flatten(1).to(weight.dtype)
