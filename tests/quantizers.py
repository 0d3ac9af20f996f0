"""What external tools make of a checkpoint: compressed-tensors' ModelCompressor on a model of transformers, and AWQ.

None of it goes by the code that stores releases.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.models import load_plain
from tests.stored import Quantized, is_linear, store
from tests.stored.awq import pack
from tests.stored.compressed import FORMATS, extremes
from workers.parity.inference import quiet_libraries

ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "FP8": {"weights": FORMATS["fp8 by channel"][1], "input_activations": ACTIVATIONS},
    "INT8": {"weights": FORMATS["int8 by channel"][1], "input_activations": {**ACTIVATIONS, "type": "int"}},
    "INT4": {"weights": FORMATS["int4 by group"][1]},
    "NVFP4": {"weights": FORMATS["nvfp4"][1]},
    "MXFP4": {"weights": FORMATS["mxfp4"][1]},
}
"""By what people call them, as a recipe of llm-compressor has them."""
_GROUP_SIZE = 16


def compress_model(release: Path, directory: Path, scheme: str) -> Path:
    """Quantize the linear weights of a checkpoint, and save it, as llm-compressor does: by ModelCompressor.

    Args:
        release: in 16 bits.
        directory: becomes the quantized one.
        scheme: one of `SCHEMES`.
    """
    model = load_plain(release)
    compress_loaded(model, directory, scheme)
    _copy_beside(release, directory)
    return directory


def compress_loaded(model: PreTrainedModel, directory: Path, scheme: str) -> None:
    """Quantize and save a loaded model; see `compress_model`."""
    group = {"targets": ["Linear"], **SCHEMES[scheme]}
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme.model_validate(group)},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.INITIALIZED,
    )
    with quiet_libraries():
        apply_quantization_config(model, config, show_progress=False)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                _scale(module)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(directory)
        compressor.update_config(str(directory))


def _scale(module: Any) -> None:
    """Set the scales of a module by the extremes of its weight."""
    scheme, weight = module.quantization_scheme, module.weight.data
    smallest, largest = extremes(weight.float(), scheme)
    second = None
    if hasattr(module, "weight_global_scale"):
        second = generate_gparam(weight.float().min(), weight.float().max())
        module.weight_global_scale.data.copy_(second)
    scales, zeros = calculate_qparams(smallest, largest, scheme.weights, second)
    module.weight_scale.data.copy_(scales)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zeros)


def _copy_beside(release: Path, directory: Path) -> None:
    for path in release.iterdir():
        if path.name.startswith(("tokenizer", "generation_config", "special_tokens")) or path.suffix == ".jinja":
            shutil.copyfile(path, directory / path.name)


def awq_of(release: Path, directory: Path) -> Path:
    """Store the linear weights of a checkpoint in AutoAWQ's layout, rounded to the nearest with zero points.

    Args:
        release: in 16 bits, in one file.
        directory: becomes it in AWQ; see `tests.stored.store`.
    """

    def quantize(name: str, weight: torch.Tensor) -> Quantized:
        num_outputs, num_inputs = weight.shape
        groups = weight.float().view(num_outputs, -1, _GROUP_SIZE)
        smallest, largest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((largest - smallest) / 15).clamp(min=1e-6).half()
        zeros = (-smallest / scales.float()).round().clamp(0, 15)
        codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
        module = name.removesuffix(".weight")
        numbers = ((codes - zeros[..., None]).half() * scales[..., None]).view(num_outputs, num_inputs)
        parts = {
            f"{module}.qweight": pack(codes.view(num_outputs, num_inputs).T.contiguous().long()),
            f"{module}.qzeros": pack(zeros.T.contiguous().long()),
            f"{module}.scales": scales.T.contiguous(),
        }
        return parts, numbers.to(weight.dtype)

    declared = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _GROUP_SIZE,
        "version": "gemm",
        "zero_point": True,
    }
    return store(release, directory, quantize, declared, takes=is_linear)


def fold_scales(release: Path, directory: Path, *, seed: int = 7) -> Path:
    """Fold scales as AWQ does before it rounds: the model computes the same, with other norms and weights.

    Norms are divided by what the columns of the weights that read them are multiplied by; rows of `up_proj` by those of
    `down_proj`.

    Args:
        release: a Llama in one file.
        directory: becomes the same in other numbers.
        seed: of the scales.
    """
    shutil.copytree(release, directory, ignore=shutil.ignore_patterns("manifest.json", "parity.*"))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    random = torch.Generator().manual_seed(seed)
    num_layers = json.loads((release / "config.json").read_text())["num_hidden_layers"]
    for layer in range(num_layers):
        owner = f"model.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            name = f"{owner}.{norm}.weight"
            scales = _scales(len(tensors[name]), random)
            tensors[name] = (tensors[name].float() / scales).to(tensors[name].dtype)
            for reader in readers:
                weight = f"{owner}.{reader}.weight"
                tensors[weight] = (tensors[weight].float() * scales).to(tensors[weight].dtype)
        up, down = (f"{owner}.mlp.{each}.weight" for each in ("up_proj", "down_proj"))
        scales = _scales(tensors[up].shape[0], random)
        tensors[up] = (tensors[up].float() / scales[:, None]).to(tensors[up].dtype)
        tensors[down] = (tensors[down].float() * scales).to(tensors[down].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def _scales(size: int, random: torch.Generator) -> torch.Tensor:
    return torch.exp(torch.empty(size).uniform_(-math.log(2), math.log(2), generator=random))
