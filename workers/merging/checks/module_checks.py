"""Parity of what PEFT merged: bit by bit against a merge of each layer by itself, and by its answers.

What is expected begins at the adapter's own files (`evidence.py`): PEFT has to hold their values, every layer it has
put on the model is merged once more by itself, planned or not, and the tensors that ship under the names of its
module have to have these bits and to answer as the layer did before (docs/decisions/0006-peft-lane.md).
"""

import copy
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from jobs.parity_report import TensorCheck
from workers.bases.model import input_embedding
from workers.files.tensor_io import read_rows
from workers.merging.checks.evidence import Evidence
from workers.merging.checks.factors import Factors, Judgement, factors_of
from workers.merging.checks.probes import Probe, Verdict, ask, base_of
from workers.merging.checks.tally import TensorChecks
from workers.merging.module_weights import ModuleWeights
from workers.merging.peft_lane import MergedModule, merge_modules
from workers.merging.plan import MergePlan
from workers.numerics.rounding import BITS, EXPONENT_BITS, half_ulp

_MAX_RMS = 4.0
"""Roundings of each weight that PEFT may come to; the largest measured over its methods is 1.8."""

_MAX_WORST = 6 * _MAX_RMS
"""The same at a single answer, in standard deviations."""

_WRONG_BITS = 2.0
"""What elements are told to be off by, at least, that are to have the same bits: zeros may differ in their sign."""


def check_modules(
    plan: MergePlan,
    directory: Path,
    weights: ModuleWeights,
    *,
    evidence: Evidence,
    stop: Callable[[], None],
    on_bytes: Callable[[int], None],
) -> TensorChecks:
    """Check every tensor that the plan leaves to PEFT, and every layer of the adapter that is not streamed.

    Args:
        plan: of the job, or a part of it.
        directory: of the merged shards.
        weights: of the base, as the merge took them.
        evidence: what the adapter says.
        stop: raises CancelledError when the work should stop; called once per module.
        on_bytes: told the bytes of merged tensors checked, as they are.
    """
    check = _Check(plan, evidence, directory, weights)

    def look(name: str, layer: Any) -> None:
        stop()
        check.look(name, layer)

    for module in merge_modules(plan, weights, wrapped=check.read_back, look=look):
        for output, made in module.outputs.items():
            on_bytes(check.compare(output, made))
        check.judge(module)
    return TensorChecks(tensors=check.found, wrong=tuple(check.wrong))


class _Check:
    """The check of one job while its modules are merged once more."""

    def __init__(self, plan: MergePlan, evidence: Evidence, directory: Path, weights: ModuleWeights) -> None:
        self.found: dict[str, TensorCheck] = {}
        self.wrong: list[str] = []
        self._plan = plan
        self._evidence = evidence
        self._directory = directory
        self._weights = weights
        self._asked: dict[str, Probe | tuple[Factors, ...]] = {}
        self._unanswered: dict[str, nn.Module] = {}
        """Merged modules, until all of their tensors are compared."""

    def read_back(self, peft_model: PeftModel) -> None:
        """Compare what PEFT holds with what the adapter's file does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base: Any = peft_model.get_base_model()
            has_tokens = input_embedding(base) is not None
            held = peft_model.state_dict() | get_peft_model_state_dict(peft_model, save_embedding_layers=has_tokens)
        self.wrong += [
            f"adapter tensor {name}: PEFT was given other values than its file holds"
            for name in self._evidence.misread(held)
        ]

    def look(self, name: str, layer: Any) -> None:
        """Merge a layer by itself, compare what ships of it, and ask it while it is not merged."""
        plan, evidence = self._plan, self._evidence
        # An attention of torch's own holds a layer of PEFT's in the place of its last projection.
        keys = [key.replace("base_layer.", "") for key in base_of(layer).state_dict()]
        outputs = {f"{name}.{key}": evidence.shipped(f"{name}.{key}") for key in keys}
        here = {source: names for source, names in outputs.items() if names and plan.merged.tensors.keys() >= {*names}}
        weight = here.get(f"{name}.weight", ("",))[0]
        if not here or (weight in evidence.pairs and plan.streams(weight)):
            return  # written elsewhere, or compared on its way
        if any(tensor.device.type == "meta" for tensor in base_of(layer).state_dict().values()):
            return  # the merge had no values for it either: what the adapter says of it is found nowhere
        merged = _merged_copy(layer).state_dict()
        for source, (output, *_) in here.items():
            # Fused weights are of several layers, and tied ones of the first.
            if source not in plan.base.conversions.group_of and output not in self.found:
                shipped, value = self._read(output), merged[source.removeprefix(f"{name}.")]
                self.found[output] = _compare(output, shipped, value, self._before(source), targeted=True)
        self._asked[name] = ask(name, layer) or factors_of(layer)

    def compare(self, output: str, made: torch.Tensor) -> int:
        """Compare a tensor that is of no layer alone: what the adapter replaces, what stays, and fused weights.

        Args:
            output: its name.
            made: by a second merge.

        Returns:
            Its bytes.
        """
        plan, evidence, weights = self._plan, self._evidence, self._weights
        num_bytes = plan.merged.tensors[output][1].num_bytes
        if output in self.found:
            return num_bytes
        source = evidence.model_names.get(output)
        before = weights.output(output) if source is None or output in plan.base.by_name else self._before(source)
        replacement = None if source is None else evidence.replacement(source)
        if output in plan.regrouped or source in plan.left_alone:
            made = before
        elif replacement is not None:
            made = evidence.read(replacement)
        self.found[output] = _compare(output, self._read(output), made, before, targeted=replacement is not None)
        return num_bytes

    def judge(self, module: MergedModule) -> None:
        """Hold the answers of layers against their modules, once all of a module's tensors are compared."""
        if module.name in self._asked:
            assert module.plain is not None
            self._unanswered[module.name] = module.plain
        for name, plain in list(self._unanswered.items()):
            asked, state = self._asked[name], self._shipped_state(name, plain)
            needed = {"weight"} if isinstance(asked, Probe) else {factors.key for factors in asked}
            if needed <= state.keys():
                del self._unanswered[name], self._asked[name]
                before = {key: _as_large(self._before(f"{name}.{key}"), shipped) for key, shipped in state.items()}
                if isinstance(asked, Probe):
                    self._judge(f"{name}.weight", asked.judge(plain, state, before))
                for factors in () if isinstance(asked, Probe) else asked:
                    self._judge(f"{name}.{factors.key}", factors.judge(state[factors.key], before[factors.key]))

    def _judge(self, source: str, verdict: Verdict | Judgement) -> None:
        for output in self._evidence.shipped(source):
            self.found[output] = _judged(self.found[output], verdict)

    def _shipped_state(self, name: str, plain: nn.Module) -> dict[str, torch.Tensor]:
        """Return what ships of a module, by the keys of its state: made of the files as loading them would make it."""
        conversions = self._plan.base.conversions
        state: dict[str, torch.Tensor] = {}
        for key in plain.state_dict():
            source = f"{name}.{key}"
            outputs = self._evidence.shipped(source)
            if not outputs or not self.found.keys() >= {*outputs}:
                continue
            group = conversions.group_of.get(source)
            state[key] = self._read(outputs[0]) if group is None else conversions.load(group, self._read)[source]
        return state

    def _before(self, source: str) -> torch.Tensor:
        """Return a weight of the base by its name in the model; zeros for a head that the base does not have."""
        head = self._plan.opened.head
        if head is not None and source in head.shapes:
            return torch.zeros(head.shapes[source])
        return self._weights.get(source)

    def _read(self, name: str) -> torch.Tensor:
        shard, spec = self._plan.merged.tensors[name]
        return read_rows(self._directory / shard.name, spec, 0, spec.shape[0] if spec.shape else 1)


def _as_large(weight: torch.Tensor, shipped: torch.Tensor) -> torch.Tensor:
    """Return a weight of the base with as many rows as ship: those of tokens that it lacks are zero."""
    if weight.shape == shipped.shape or weight.shape[1:] != shipped.shape[1:] or not weight.dim():
        return weight
    rows = weight.new_zeros(shipped.shape)
    count = min(len(weight), len(shipped))
    rows[:count] = weight[:count]
    return rows


def _merged_copy(layer: Any) -> nn.Module:
    """Merge a copy of a layer, by PEFT alone."""
    own = copy.deepcopy(layer)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if hasattr(own, "unload_and_optionally_merge_module"):
            merged: nn.Module = own.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            return merged
        own.merge(safe_merge=False)
    return base_of(own)


def _compare(
    name: str, shipped: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, *, targeted: bool
) -> TensorCheck:
    rounded = expected.detach().to(shipped.dtype)
    different = _differences(shipped, rounded)
    error = (shipped.double() - rounded.double()).abs()[different]
    excess = 0.0
    if error.numel():
        allowed = half_ulp(rounded[different]) if rounded.dtype in EXPONENT_BITS else 0.5
        excess = max(_finite(float((error / allowed).max())), _WRONG_BITS)
    weight_norm = delta_norm = 0.0
    weight = _as_large(before, shipped).float()
    if weight.shape == shipped.shape:
        weight_norm = float(torch.linalg.vector_norm(weight))
        delta_norm = float(torch.linalg.vector_norm(rounded.float() - weight))
    return TensorCheck(
        tensor=name,
        changed=before.shape != shipped.shape or bool(_differences(shipped, before.to(shipped.dtype)).any()),
        targeted=targeted,
        max_abs_error=_finite(float(error.max())) if error.numel() else 0.0,
        rounding_excess=excess,
        num_bad_elements=int(different.sum()),
        weight_norm=_finite(weight_norm),
        delta_norm=_finite(delta_norm),
        survival=None,
    )


def _differences(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    bits = BITS[left.itemsize]
    return left.contiguous().view(bits) != right.contiguous().view(bits)


def _judged(check: TensorCheck, verdict: Verdict | Judgement) -> TensorCheck:
    excess = max(check.rounding_excess, _finite(verdict.rms) / _MAX_RMS, _finite(verdict.worst) / _MAX_WORST)
    has_delta = verdict.delta_square > 0 and math.isfinite(verdict.kept)
    return check.model_copy(
        update={
            "targeted": True,
            "rounding_excess": excess,
            "survival": verdict.kept / verdict.delta_square if has_delta else None,
        }
    )


def _finite(value: float) -> float:
    # NaN and infinity have no place in a JSON report; they are as wrong as can be.
    return value if math.isfinite(value) else sys.float_info.max
