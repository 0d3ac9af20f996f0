"""Does the proof find every wrong merge? One delta is dropped, halved, swapped or moved, and has to be named.

    make wrong-merges ROUNDS=200
    python -m tests.wrong_merges --rounds 200 --seed 1

Each round makes an adapter of some kind for some base, breaks the engine at one place between the adapter's file and
the release, and merges at parity level `arithmetic`. What passes, or fails without naming the tensor, is printed.
"""

import argparse
import dataclasses
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import workers.adapters.wearing
import workers.merging.merge
import workers.merging.peft_lane
import workers.merging.stream_lane
import workers.unit.unit
from jobs.errors import FailureClass
from jobs.parity_report import ParityReport
from jobs.release import REPORT_NAME
from jobs.request import MergeRequest
from tests import architectures
from tests.methods import make_method_adapter, save_old_adapter
from tests.models import build_llama, build_qwen2, make_adapter
from workers.merging.outcomes import JobOutcome
from workers.merging.plan import MergePlan
from workers.merging.settings import WorkerSettings
from workers.worker import MergeWorker

STREAMED: Mapping[str, Mapping[str, Any]] = {
    "q, v": {"targets": ["q_proj", "v_proj"]},
    "all linear": {},
    "rank-stabilized, patterns": {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "with biases": {"bias": "all", "trained": True},
}
BY_PEFT: Mapping[str, Mapping[str, Any]] = {
    "DoRA": {"use_dora": True},
    "a head": {"targets": ["lm_head", "q_proj"]},
    "an embedding": {"targets": ["embed_tokens", "q_proj"]},
    "a trained head": {"targets": ["q_proj"], "modules_to_save": ["lm_head"], "trained": True},
}
WITH_EXPERTS = "a mixtral"
EXPERTS: Mapping[str, Mapping[str, Any]] = {
    "single experts": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "experts together": {"targets": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
}
"""Of a base that has them, and as two versions of transformers train them."""
METHODS = ("LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT", "HRA", "ADALORA", "MISS", "FOURIERFT")


@dataclass(frozen=True, slots=True)
class Broken:
    """A merge with one fault in it."""

    words: str
    names: tuple[str, ...]
    """Of modules; the proof has to name a tensor of one of them."""
    patch: Callable[[], Any]
    """Returns a context in which the engine has the fault."""


def in_the_plan(change: Callable[[MergePlan], MergePlan]) -> Any:
    """Return a context in which plans are changed after they were made."""
    really = workers.unit.unit.plan_merge
    return mock.patch.object(workers.unit.unit, "plan_merge", lambda *what: change(really(*what)))


def break_streamed(plan: MergePlan, rng: random.Random) -> Broken:
    """Break what happens to one plain delta of LoRA."""
    name = rng.choice(sorted(plan.deltas))
    delta = plan.deltas[name]
    same = [
        other
        for other, each in plan.deltas.items()
        if other != name and (each.a_RI.shape, each.b_OR.shape) == (delta.a_RI.shape, delta.b_OR.shape)
    ]
    shape = plan.base.by_name[name].shape
    free = [t.name for t in plan.base.tensors if t.shape == shape and t.name not in plan.deltas]
    kinds = ["drop", "halve", "drop a half when it is read", "halve a half when it is read", "drop where it is added"]
    kinds += ["swap"] * bool(same) + ["move"] * bool(free)
    match rng.choice(kinds):
        case "drop":
            deltas = {other: each for other, each in plan.deltas.items() if other != name}
        case "halve":
            deltas = {**plan.deltas, name: dataclasses.replace(delta, scaling=delta.scaling / 2)}
        case "swap":
            other = rng.choice(same)
            deltas = {**plan.deltas, name: plan.deltas[other], other: delta}
        case "move":
            deltas = {other: each for other, each in plan.deltas.items() if other != name}
            deltas[rng.choice(free)] = delta
        case words:
            factor = 0.5 if words.startswith("halve") else 0.0
            spec = rng.choice([delta.a_RI, delta.b_OR])
            if words == "drop where it is added":
                return Broken(words, (name,), lambda: _merging_nothing(name))
            return Broken(
                words, (name,), lambda: _reading(workers.merging.stream_lane, "read_operand", spec.name, factor)
            )
    words = "drop, halve, swap or move in the plan"
    return Broken(words, (name,), lambda: in_the_plan(lambda made: dataclasses.replace(made, deltas=deltas)))


def break_by_peft(plan: MergePlan, changed: Collection[str], rng: random.Random) -> Broken:
    """Break what happens to one tensor that is left to PEFT."""
    output = rng.choice(sorted(plan.by_peft.keys() & changed))
    module = plan.by_peft[output][0].rpartition(".")[0]
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    same = [other for other in plan.by_peft if other != output and shapes[other] == shapes[output]]
    inside = [spec for name, spec in plan.opened.tensors.items() if f".{module}." in f".{name}."]
    # What is streamed is read from the file by itself: what PEFT holds of it goes nowhere.
    streamed = {spec.name for delta in plan.deltas.values() for spec in (delta.a_RI, delta.b_OR)}
    tensors = [spec for spec in inside if spec.name not in streamed]
    kinds = ["drop", "halve"] + ["misread"] * bool(tensors)
    if plan.by_peft[output][0] not in plan.base.conversions.group_of:  # groups are written whole, whatever is planned
        kinds += ["forget"] + ["swap"] * bool(same)
    match rng.choice(kinds):
        case "forget" if plan.base.by_name.get(output):
            left = {other: sources for other, sources in plan.by_peft.items() if other != output}
            return Broken(
                "forget it in the plan",
                (output, module),
                lambda: in_the_plan(lambda made: dataclasses.replace(made, by_peft=left)),
            )
        case "swap":
            other = rng.choice(same)
            swapped = {**plan.by_peft, output: plan.by_peft[other], other: plan.by_peft[output]}
            return Broken(
                "swap two outputs",
                (output, other, module),
                lambda: in_the_plan(lambda made: dataclasses.replace(made, by_peft=swapped)),
            )
        case "misread":
            spec = rng.choice(tensors)
            return Broken(
                "give PEFT half of it",
                (output, module),
                lambda: _reading(workers.adapters.wearing, "read_tensor", spec.name, 0.5),
            )
        case words:
            kept = 0.5 if words == "halve" else 0.0
            return Broken(f"{words} what PEFT made", (output, module), lambda: _making(plan, output, kept))


@contextmanager
def _reading(module: Any, function: str, name: str, factor: float) -> Iterator[None]:
    really = getattr(module, function)

    def read(where: Any, spec: Any, *file: int) -> torch.Tensor:
        read_tensor: torch.Tensor = really(where, spec, *file)
        return read_tensor * factor if spec.name == name else read_tensor

    with mock.patch.object(module, function, read):
        yield


@contextmanager
def _merging_nothing(name: str) -> Iterator[None]:
    really = workers.merging.stream_lane.Walk._operands

    def operands(self: Any, tile: Any, job: Any) -> tuple[torch.Tensor, torch.Tensor]:
        a_RI, b_OR = really(self, tile, job)
        return (a_RI, torch.zeros_like(b_OR)) if tile.weight.tensor.name == name else (a_RI, b_OR)

    with mock.patch.object(workers.merging.stream_lane.Walk, "_operands", operands):
        yield


@contextmanager
def _making(plan: MergePlan, output: str, kept: float) -> Iterator[None]:
    """Have the merge keep a part of what it changes; the second merge of the check is right."""
    really = workers.merging.merge.merge_modules

    def modules(*what: Any, **how: Any) -> Iterator[Any]:
        weights = what[1]
        for module in really(*what, **how):
            outputs = dict(module.outputs)
            if output in outputs:
                source = plan.by_peft[output][0]
                before = weights.output(output) if output in plan.base.by_name else weights.get(source)
                outputs[output] = before.float() + kept * (outputs[output].float() - before.float())
            yield dataclasses.replace(module, outputs=outputs)

    with mock.patch.object(workers.merging.merge, "merge_modules", modules):
        yield


def run_round(directory: Path, bases: Mapping[str, Path], rng: random.Random) -> tuple[str, str]:
    """Return what was broken, and what is wrong with the answer: nothing where the proof has found it."""
    kind = rng.choice([*STREAMED, *BY_PEFT, *EXPERTS, *METHODS])
    base = rng.choice(sorted(bases.keys() - {WITH_EXPERTS})) if kind not in EXPERTS else WITH_EXPERTS
    seed = rng.randrange(1 << 30)
    if kind == "single experts":
        adapter = directory / "adapter"
        save_old_adapter(bases[base], adapter, seed=seed, std=rng.choice([0.01, 0.1]), **EXPERTS[kind])
    elif kind in METHODS:
        adapter = make_method_adapter(bases[base], directory / "adapter", kind, std=rng.choice([0.02, 0.1]), seed=seed)
    else:
        fields = (STREAMED | BY_PEFT | EXPERTS)[kind]
        adapter = make_adapter(bases[base], directory / "adapter", seed=seed, std=rng.choice([0.01, 0.1]), **fields)
    request = MergeRequest(
        id="job",
        base=str(bases[base]),
        adapter=str(adapter),
        destination=str(directory / "release"),
        base_quantization=rng.choice(["none", "nf4"]),
        parity={"level": "arithmetic"},
    )
    right, plan = merge_once(request, directory / "right")
    if right.failure is not None:
        return kind, f"fails where nothing is broken: {right.failure.message}"
    report = ParityReport.model_validate_json((right.report_path / REPORT_NAME).read_bytes())
    changed = {check.tensor for check in report.tensors if check.changed}
    streamed = bool(plan.deltas) and (not plan.by_peft.keys() & changed or rng.random() < 0.5)
    broken = break_streamed(plan, rng) if streamed else break_by_peft(plan, changed, rng)
    with broken.patch():
        outcome, _ = merge_once(request, directory / "wrong")
    what = f"{kind} on {base} in {request.base_quantization}: {broken.words} ({broken.names[0]})"
    if outcome.failure is None:
        return what, "passed"
    if outcome.failure.failure_class is not FailureClass.PARITY_FAILED:
        return what, f"failed as {outcome.failure.failure_class}: {outcome.failure.message}"
    report = ParityReport.model_validate_json((outcome.report_path / REPORT_NAME).read_bytes())
    modules = [name.removesuffix(".weight").removesuffix(".bias") for name in broken.names]
    if not any(module in failure for failure in report.failures for module in modules):
        return what, f"does not name it: {report.failures}"
    return what, ""


def merge_once(request: MergeRequest, directory: Path) -> tuple[JobOutcome, MergePlan]:
    """Merge a request in a worker of its own, below a new directory; return what came of it, and how it was planned."""
    directory.mkdir()
    settings = WorkerSettings(
        cache=directory.parent / "cache", scratch=directory, reports=directory / "reports", device="cpu", num_threads=1
    )
    plans = []
    worker = MergeWorker(settings)
    with in_the_plan(lambda made: plans.append(made) or made):
        (outcome,) = worker.run_unit("round", (request,)).jobs
    worker.close()
    return outcome, plans[0]


def main() -> int:
    """Run the rounds; return 1 if one of them was not found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    found, missed = Counter[str](), []
    with tempfile.TemporaryDirectory() as place:
        shape = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "tokenizer": False}
        bases = {
            "a llama": build_llama(Path(place, "llama"), **shape),
            "a tied qwen2": build_qwen2(Path(place, "qwen2"), **shape),
            WITH_EXPERTS: architectures.build("decoder", "mixtral", Path(place, "mixtral")),
        }
        for number in range(options.rounds):
            with tempfile.TemporaryDirectory(dir=place) as directory:
                what, wrong = run_round(Path(directory), bases, rng)
            if wrong:
                missed.append(f"{what}: {wrong}")
                print(f"MISSED round {number}: {missed[-1]}", flush=True)
            else:
                found[what.partition(": ")[2].partition(" (")[0]] += 1
    for words, num_found in found.most_common():
        print(f"{num_found:5d}  {words}")
    print(f"{sum(found.values())} of {options.rounds} found and named")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
