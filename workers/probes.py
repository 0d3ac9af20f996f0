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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from jobs.release import TensorCheck
from workers.factors import Factors, factors_of
from workers.lanes.peft import merge_modules
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
    checks: dict[str, TensorCheck] = {}
    probes: dict[str, _Probe | tuple[Factors, ...]] = {}
    unanswered: dict[str, nn.Module] = {}

    def ask(name: str, layer: Any) -> None:
        check()
        if plan.merges(name):
            probes[name] = _ask(name, layer) or factors_of(layer)

    base_values = {plan.made_of[name]: name for name in plan.left_alone if name in plan.made_of}
    for module in merge_modules(plan, weights, look=ask):
        for output, made in module.outputs.items():
            shipped = _read(plan, directory, output)
            expected = weights.get(base_values[output]) if output in base_values else made
            checks[output] = _compare_bits(plan, output, shipped, expected, weights)
            on_bytes(shipped.numel() * shipped.itemsize)
        if module.name in probes:
            assert module.plain is not None
            unanswered[module.name] = module.plain
        for name, plain in list(unanswered.items()):
            probe = probes[name]
            needed = {"weight"} if isinstance(probe, _Probe) else {factors.key for factors in probe}
            state = _shipped_state(plan, directory, name, plain, checks.keys())
            if not needed <= state.keys():
                continue
            del unanswered[name], probes[name]
            before = {key: _as_large(weights.get(f"{name}.{key}"), shipped) for key, shipped in state.items()}
            if isinstance(probe, _Probe):
                output = _output_of(plan, f"{name}.weight")
                checks[output] = _judge(checks[output], plain, state, before, probe)
                continue
            for factors in probe:
                output = _output_of(plan, f"{name}.{factors.key}")
                found = factors.judge(state[factors.key], before[factors.key])
                checks[output] = _judged(checks[output], found.rms, found.worst, found.kept, found.delta_square)
    return checks


def _output_of(plan: MergePlan, source: str) -> str:
    return next(output for output, sources in plan.by_peft.items() if source in sources)


def _shipped_state(
    plan: MergePlan, directory: Path, name: str, plain: nn.Module, checked: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return what ships of a module, by the keys of its state: made of the files as loading them would make it."""
    conversions = plan.base.conversions
    state: dict[str, torch.Tensor] = {}
    for key in plain.state_dict():
        source = f"{name}.{key}"
        group = conversions.group_of.get(source)
        if group is not None and set(group.stored) <= set(checked):
            state[key] = conversions.load(group, lambda stored: _read(plan, directory, stored))[source]
        elif (output := plan.made_of.get(source)) in checked:
            assert output is not None
            state[key] = _read(plan, directory, output)
    return state


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
    before = _as_large(weights.output(name), shipped) if name in plan.base.by_name else None
    if before is not None and before.shape == shipped.shape:
        weight = before.float()
        weight_norm = float(torch.linalg.vector_norm(weight))
        delta_norm = float(torch.linalg.vector_norm(rounded.float() - weight))
    return TensorCheck(
        tensor=name,
        changed=name in plan.changed,
        max_abs_error=_finite(float(error.max())) if error.numel() else 0.0,
        rounding_excess=excess,
        num_bad_elements=int(different.sum()),
        weight_norm=_finite(weight_norm),
        delta_norm=_finite(delta_norm),
        survival=None,
    )


def _as_large(weight: torch.Tensor, shipped: torch.Tensor) -> torch.Tensor:
    """Return a weight of the base with as many rows as ship: those of tokens that it lacks are zero."""
    if weight.shape == shipped.shape or weight.shape[1:] != shipped.shape[1:] or not weight.dim():
        return weight
    rows = weight.new_zeros(shipped.shape)
    count = min(len(weight), len(shipped))
    rows[:count] = weight[:count]
    return rows


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


def _judge(check: TensorCheck, plain: nn.Module, shipped: _State, before: _State, probe: _Probe) -> TensorCheck:
    """Add to the check of a module's weight what its answers say, with the weights that ship and those of the base."""
    if not probe.answers.numel():
        return check
    with torch.no_grad():
        merged = _answer(plain, shipped, probe.inputs)
        unchanged = _answer(plain, before, probe.inputs)
        error = (merged - probe.answers) / _deviation(plain, shipped, torch.maximum(merged.abs(), unchanged.abs()))
        delta = probe.answers - unchanged
        size = float(torch.linalg.vector_norm(delta)) ** 2
        kept = float(torch.sum((merged - unchanged) * delta))
    return _judged(check, float(error.square().mean().sqrt()), float(error.abs().max()), kept, size)


def _judged(check: TensorCheck, rms: float, worst: float, kept: float, delta_square: float) -> TensorCheck:
    return check.model_copy(
        update={
            "rounding_excess": max(check.rounding_excess, _finite(rms) / _MAX_RMS, _finite(worst) / _MAX_WORST),
            "survival": kept / delta_square if delta_square > 0 and math.isfinite(kept) else None,
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
