"""Parity of what PEFT merged, by answers: the unmerged layer in float64 against the module with the weights that ship.

What is left between the answers is the rounding of the weights: of each of them once, and PEFT rounds some deltas
before it adds them. It is held against the standard deviation that one rounding of each weight would give, as a root
mean square over all answers and at the worst one (docs/decisions/0006-peft-lane.md).

Shape suffixes: N random inputs, O outputs of a module.
"""

import copy
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from workers.numerics.rounding import half_ulp

State = Mapping[str, torch.Tensor]
"""Tensors of a module, by the keys of its state."""

_NUM_INPUTS = 8
_NUM_ROWS = 256
"""Rows of an embedding that are asked for."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Random inputs of a module, and what the unmerged layer answers."""

    inputs: torch.Tensor
    answers: torch.Tensor
    """float64."""

    def judge(self, plain: nn.Module, shipped: State, before: State) -> "Verdict":
        """Say what a module answers with the weights that ship.

        Args:
            plain: the module, merged.
            shipped: its tensors in the release.
            before: those of the base.
        """
        if not self.answers.numel():
            return Verdict()
        with torch.no_grad():
            merged = _answer(plain, shipped, self.inputs)
            unchanged = _answer(plain, before, self.inputs)
            error = (merged - self.answers) / _deviation(plain, shipped, torch.maximum(merged.abs(), unchanged.abs()))
            delta = self.answers - unchanged
            return Verdict(
                rms=float(error.square().mean().sqrt()),
                worst=float(error.abs().max()),
                kept=float(torch.sum((merged - unchanged) * delta)),
                delta_square=float(torch.linalg.vector_norm(delta)) ** 2,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Errors in standard deviations of one rounding of each weight, and what is left of the delta."""

    rms: float = 0.0
    worst: float = 0.0
    kept: float = 0.0
    """<merged - W, delta>, of answers."""
    delta_square: float = 0.0


def base_of(layer: Any) -> nn.Module:
    """Return the module that PEFT has put a layer in the place of."""
    base: nn.Module = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
    return base


def ask(name: str, layer: Any) -> Probe | None:
    """Ask a layer that is not merged.

    Args:
        name: of the module; the inputs follow from it.
        layer: what PEFT put in its place.

    Returns:
        None where inputs of such a module are not known.
    """
    inputs = _inputs(name, base_of(layer))
    if inputs is None:
        return None
    with torch.no_grad():
        return Probe(inputs, _in_float64(layer)(inputs))


def _in_float64(module: nn.Module) -> Any:
    exact = copy.deepcopy(module).double()
    for part in exact.modules():
        for key, buffer in part.named_buffers(recurse=False):
            # What a model makes of its configuration alone has no values here; it is the same before and after.
            if buffer.device.type == "meta":
                setattr(part, key, torch.ones_like(buffer, device="cpu"))
        # Some methods keep tensors that are neither parameters nor buffers, and the dtype they compute in.
        for key, value in vars(part).items():
            if isinstance(value, torch.dtype) and value.is_floating_point:
                vars(part)[key] = torch.float64
            elif isinstance(value, torch.Tensor) and value.is_floating_point():
                vars(part)[key] = value.double()
            elif isinstance(value, dict) and not key.startswith("_"):
                vars(part)[key] = {
                    name: held.double() if isinstance(held, torch.Tensor) and held.is_floating_point() else held
                    for name, held in value.items()
                }
    return exact


def _inputs(name: str, module: nn.Module) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (_NUM_ROWS,), generator=generator)
    if type(module) is nn.Linear:
        shape: tuple[int, ...] = (_NUM_INPUTS, module.in_features)
    elif isinstance(module, Conv1D):
        shape = (_NUM_INPUTS, module.nx)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        extent = [(size - 1) * step + 1 for size, step in zip(module.kernel_size, module.dilation, strict=True)]
        shape = (_NUM_INPUTS, module.in_channels, *extent)
    else:
        return None
    return torch.randint(2, shape, generator=generator, dtype=torch.float64) * 2 - 1


def _answer(module: nn.Module, state: State, inputs: torch.Tensor) -> torch.Tensor:
    exact = _in_float64(module)
    exact.load_state_dict({key: tensor.double() for key, tensor in state.items()}, strict=False)
    answers: torch.Tensor = exact(inputs)
    return answers


def _deviation(module: nn.Module, shipped: State, size_NO: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of an answer when each weight behind it is rounded once, uniformly.

    Besides, the merge computes in float32: its error grows with the norm of the weights behind an answer, and for one
    weight of an embedding with that of its row, as the terms of its delta may cancel out.

    Args:
        module: of the answers.
        shipped: its weights.
        size_NO: the answers' size with these weights or with those of the base, whichever is larger.
    """
    weight = shipped["weight"]
    if isinstance(module, nn.Embedding):
        # An answer is one weight, times a scale that some models give their embeddings.
        rounding_NO = size_NO * (torch.finfo(weight.dtype).eps / math.sqrt(12)) + torch.finfo(weight.dtype).tiny
        return rounding_NO + 4 * torch.finfo(torch.float32).eps * size_NO.square().mean(-1, keepdim=True).sqrt()
    others = 0 if isinstance(module, Conv1D) else tuple(range(1, weight.dim()))
    variance_O = (2 * half_ulp(weight).double()).square().sum(others) / 12
    if "bias" in shipped:
        variance_O += (2 * half_ulp(shipped["bias"]).double()).square() / 12
    deviation_O = torch.sqrt(variance_O)
    deviation_O += 4 * torch.finfo(torch.float32).eps * torch.sqrt(weight.double().square().sum(others))
    return deviation_O.reshape(-1, *[1] * (size_NO.dim() - 2))
