"""Parity of what PEFT merged: against the unmerged adapter in float64, and against a second merge.

The layer that PEFT put in the place of a module answers random inputs, not merged, in float64; so does the module with
the weights that ship. What is left between the answers is the rounding of the weights: of each of them once, and PEFT
rounds some deltas before it adds them. It is held against the standard deviation that one rounding of each weight
would give, as a root mean square over all answers and at the worst one. A second merge has to give the same bits, so
that one wrong bit is found, too (docs/decisions/0006-peft-lane.md).

Shape suffixes: N random inputs, O outputs of a module.
"""

import copy
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from jobs.release import TensorCheck
from workers.lanes.adapter import put_on, take_off, wrapped_modules
from workers.module_weights import ModuleWeights
from workers.plan import MergePlan
from workers.rounding import BITS, EXPONENT_BITS, half_ulp
from workers.tensor_io import read_rows

_State = Mapping[str, torch.Tensor]

_NUM_INPUTS = 8
_NUM_ROWS = 256
"""Rows of an embedding that are asked for."""

_MAX_RMS = 4.0
"""Roundings of each weight that PEFT may come to; the largest measured over its methods is 1.8."""

_MAX_WORST = 6 * _MAX_RMS
"""The same at a single answer, in standard deviations."""


@dataclass(frozen=True, slots=True)
class _Probe:
    """Random inputs of a module, and what the unmerged layer answers."""

    inputs: torch.Tensor
    answers: torch.Tensor
    """float64."""


def check_modules(
    plan: MergePlan,
    directory: Path,
    weights: ModuleWeights,
    check: Callable[[], None],
    on_bytes: Callable[[int], None],
) -> dict[str, TensorCheck]:
    """Check every tensor that the plan leaves to PEFT.

    Args:
        plan: of the job.
        directory: of the merged shards.
        weights: of the base, as the merge took them.
        check: raises CancelledError when the work should stop; called once per module.
        on_bytes: told the bytes of merged tensors checked, as they are.

    Returns:
        One check for each of these tensors, by name.
    """
    model = weights.model()
    peft_model = put_on(plan.opened, model, values=True).model
    outputs: dict[str, list[str]] = {}
    for output, source in plan.by_peft.items():
        outputs.setdefault(source, []).append(output)
    checks: dict[str, TensorCheck] = {}

    def compare(source: str, expected: torch.Tensor) -> None:
        for output in outputs.pop(source):
            shipped = _read(plan, directory, output)
            checks[output] = _compare_bits(plan, output, shipped, expected, weights)
            on_bytes(shipped.numel() * shipped.itemsize)

    for name, layer in wrapped_modules(peft_model):
        check()
        merges = plan.merges(name)
        probe = _ask(name, layer) if merges else None
        plain = take_off(plan.opened, peft_model, name, merge=merges)
        own = plain.state_dict()
        for key, tensor in own.items():
            if f"{name}.{key}" in outputs and f"{name}.{key}" not in plan.tied:
                compare(f"{name}.{key}", tensor)
        if probe is not None and f"{name}.weight" in checks:
            keys = [key for key in own if f"{name}.{key}" in checks]
            shipped = {key: _read(plan, directory, f"{name}.{key}") for key in keys}
            before = {key: weights.get(f"{name}.{key}") for key in keys}
            checks[f"{name}.weight"] = _judge(checks[f"{name}.weight"], plain, shipped, before, probe)
        if plan.tied.isdisjoint(f"{name}.{key}" for key in own):
            model.set_submodule(name, nn.Identity())  # what it held is free again
    for source in list(outputs):
        compare(source, model.get_parameter(source).data)
    return checks


def _read(plan: MergePlan, directory: Path, name: str) -> torch.Tensor:
    shard, spec = plan.output.tensors[name]
    return read_rows(directory / shard.name, spec, 0, spec.shape[0] if spec.shape else 1)


def _compare_bits(
    plan: MergePlan, name: str, shipped: torch.Tensor, expected: torch.Tensor, weights: ModuleWeights
) -> TensorCheck:
    rounded = expected.detach().to(shipped.dtype)
    different = shipped.view(BITS[shipped.itemsize]) != rounded.contiguous().view(BITS[shipped.itemsize])
    error = (shipped.double() - rounded.double()).abs()[different]
    excess = 0.0
    if error.numel():
        allowed = half_ulp(rounded[different]) if rounded.dtype in EXPONENT_BITS else 0.5
        excess = _finite(float((error / allowed).max()))
    weight_norm = delta_norm = 0.0
    if name in plan.base.by_name and plan.base.by_name[name].shape == tuple(shipped.shape):
        weight = weights.get(name).float()
        weight_norm = float(torch.linalg.vector_norm(weight))
        delta_norm = float(torch.linalg.vector_norm(rounded.float() - weight))
    return TensorCheck(
        tensor=name,
        changed=True,
        max_abs_error=_finite(float(error.max())) if error.numel() else 0.0,
        rounding_excess=excess,
        num_bad_elements=int(different.sum()),
        weight_norm=_finite(weight_norm),
        delta_norm=_finite(delta_norm),
        survival=None,
    )


def _ask(name: str, layer: Any) -> _Probe | None:
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
    inputs = _inputs(name, base)
    if inputs is None:
        return None
    with torch.no_grad():
        return _Probe(inputs, _in_float64(layer)(inputs))


def _in_float64(module: nn.Module) -> Any:
    exact = copy.deepcopy(module).double()
    for part in exact.modules():
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
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (_NUM_INPUTS, module.in_features)
    elif isinstance(module, Conv1D):
        shape = (_NUM_INPUTS, module.nx)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        extent = [(size - 1) * step + 1 for size, step in zip(module.kernel_size, module.dilation, strict=True)]
        shape = (_NUM_INPUTS, module.in_channels, *extent)
    else:
        return None
    return torch.randint(2, shape, generator=generator, dtype=torch.float64) * 2 - 1


def _judge(check: TensorCheck, plain: nn.Module, shipped: _State, before: _State, probe: _Probe) -> TensorCheck:
    """Add to the check of a module's weight what its answers say, with the weights that ship and those of the base."""
    with torch.no_grad():
        merged = _answer(plain, shipped, probe.inputs)
        unchanged = _answer(plain, before, probe.inputs)
        error = (merged - probe.answers) / _deviation(plain, shipped, torch.maximum(merged.abs(), unchanged.abs()))
        delta = probe.answers - unchanged
        size = float(torch.linalg.vector_norm(delta)) ** 2
        kept = float(torch.sum((merged - unchanged) * delta))
    rms = _finite(float(error.square().mean().sqrt()))
    worst = _finite(float(error.abs().max()))
    return check.model_copy(
        update={
            "rounding_excess": max(check.rounding_excess, rms / _MAX_RMS, worst / _MAX_WORST),
            "survival": kept / size if size > 0 and math.isfinite(kept) else None,
        }
    )


def _answer(module: nn.Module, state: _State, inputs: torch.Tensor) -> torch.Tensor:
    exact = _in_float64(module)
    exact.load_state_dict({key: tensor.double() for key, tensor in state.items()}, strict=False)
    answers: torch.Tensor = exact(inputs)
    return answers


def _deviation(module: nn.Module, shipped: _State, size_NO: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of an answer when each weight behind it is rounded once, uniformly.

    Besides, the merge computes in float32: its error grows with the norm of the weights behind an answer.

    Args:
        module: of the answers.
        shipped: its weights.
        size_NO: the answers' size with these weights or with those of the base, whichever is larger.
    """
    weight = shipped["weight"]
    if isinstance(module, nn.Embedding):
        # An answer is one weight, times a scale that some models give their embeddings.
        relative = torch.finfo(weight.dtype).eps / math.sqrt(12) + 4 * torch.finfo(torch.float32).eps
        return size_NO * relative + torch.finfo(weight.dtype).tiny
    others = 0 if isinstance(module, Conv1D) else tuple(range(1, weight.dim()))
    variance_O = (2 * half_ulp(weight).double()).square().sum(others) / 12
    if "bias" in shipped:
        variance_O += (2 * half_ulp(shipped["bias"]).double()).square() / 12
    deviation_O = torch.sqrt(variance_O)
    deviation_O += 4 * torch.finfo(torch.float32).eps * torch.sqrt(weight.double().square().sum(others))
    return deviation_O.reshape(-1, *[1] * (size_NO.dim() - 2))


def _finite(value: float) -> float:
    # NaN and infinity have no place in a JSON report; they are as wrong as can be.
    return value if math.isfinite(value) else sys.float_info.max
