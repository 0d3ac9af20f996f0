"""What base + adapter computes, in float64: the embeddings and the head that unmerged layers of PEFT answer with.

A merge of PEFT's own is no reference there: where the two are one parameter, it changes both.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from tests.merges import load_dequantized
from tests.models import load_plain
from workers.parity.inference import quiet_libraries


def computed_ends(base: Path, adapter: Path, quantization: BitsAndBytesConfig | None = None) -> dict[str, torch.Tensor]:
    """Return the weights that the two ends of base + adapter compute with.

    Args:
        base: directory of the base.
        adapter: directory of the adapter.
        quantization: how the base is loaded; None for its own weights.

    Returns:
        [vocabulary, hidden] in float64, by the names that the model's weights have: of its input embeddings, of every
        other embedding that is tied to them, and of the head.
    """
    with quiet_libraries(), torch.no_grad():
        model = load_dequantized(base, quantization) if quantization else load_plain(base)
        scales = {name: _scale(module) for name, module in model.named_modules() if _is_end(model, module)}
        peft_model = PeftModel.from_pretrained(model, adapter).eval().double()
        layers = {name: peft_model.get_base_model().get_submodule(name) for name in scales}
        return {f"{name}.weight": _weight(layers[name]) / scale for name, scale in scales.items()}


def is_rounded(merged: torch.Tensor, exact: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a weight is the exact one, rounded once, and once more where PEFT rounds a delta before it adds it.

    Args:
        merged: in its own dtype.
        exact: in float64.
        before: the base's.
    """
    delta = (exact - before.double()).abs()
    allowed = 0.51 * torch.finfo(merged.dtype).eps * (exact.abs() + delta + torch.finfo(merged.dtype).tiny)
    return bool(((merged.double() - exact).abs() <= allowed).all())


def _is_end(model: Any, module: nn.Module) -> bool:
    size = model.get_input_embeddings().weight.shape
    return (type(module) is nn.Linear and module.weight.shape == size and module is model.get_output_embeddings()) or (
        isinstance(module, nn.Embedding) and module.weight.shape == size
    )


def _scale(module: nn.Module) -> float:
    return float(getattr(module, "embed_scale", 1.0))


def _weight(layer: Any) -> torch.Tensor:
    ask: Callable[[torch.Tensor], torch.Tensor] = layer
    if isinstance(_plain(layer), nn.Embedding):
        return ask(torch.arange(_plain(layer).num_embeddings))
    inputs = torch.eye(_plain(layer).in_features, dtype=torch.float64)
    return (ask(inputs) - ask(torch.zeros_like(inputs))).T


def _plain(layer: Any) -> Any:
    while not isinstance(layer, nn.Embedding | nn.Linear):
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
    return layer
