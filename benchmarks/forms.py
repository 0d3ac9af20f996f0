"""What a form leaves of an adapter: the packaged real model, six trained adapters, every form that needs no data.

The adapters are those of `benchmarks.bases`: three habits, each trained on 16-bit and on NF4 weights and merged into
what it was trained on. Prints a Markdown table of survival and, on held-out chats, KL, top-1 and NLL against base and
adapter.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.bases import held_out_texts, trained_adapters
from examples.chats import HABITS
from examples.real_model import build_base
from jobs.parity_policy import ParityPolicy, Thresholds
from jobs.parity_report import ParityReport
from jobs.request import MergeRequest
from workers.bases.forms.compressed.output import PRESETS
from workers.merging.settings import WorkerSettings
from workers.worker import MergeWorker

_OF_BFLOAT16: dict[str, dict[str, Any]] = {"bf16": {"dtype": "bfloat16"}} | {
    form.value: {"dtype": "bfloat16", "output": form} for form in PRESETS
}
_PASSES: tuple[dict[str, dict[str, Any]], ...] = (_OF_BFLOAT16, {"float16": {"dtype": "float16"}})
"""What is merged at once, by name."""
_ADAPTER_FILE = "adapter_model.safetensors"
_ANYTHING = Thresholds(max_mean_kl=1e3, min_top1_agreement=0, max_lost_share=1, min_survival=0)
"""A measurement: whatever is lost, the report is wanted."""


def measure(directory: Path) -> dict[tuple[str, str], ParityReport]:
    """Merge every adapter into every form.

    Args:
        directory: what is there is not made again, reports included: a run that was stopped goes on.

    Returns:
        Reports by adapter and form.
    """
    base = build_base(directory / "base")
    habits = {habit.name: habit for habit in HABITS}
    found: dict[tuple[str, str], ParityReport] = {}
    with (
        tempfile.TemporaryDirectory(dir=directory) as room,
        contextlib.closing(_worker(directory, Path(room))) as worker,
    ):
        for name, adapter in trained_adapters(base, directory / "adapters").items():
            habit, trained_on = name.rsplit("-", 1)
            policy = ParityPolicy(texts=held_out_texts(base, habits[habit]), thresholds=_ANYTHING)
            fields = {"base": str(base), "adapter": str(adapter), "base_quantization": trained_on, "parity": policy}
            for forms in _PASSES:
                reports = {form: directory / "reports" / name / f"{form}.json" for form in forms}
                if not all(report.exists() for report in reports.values()):
                    place = Path(room) / "releases" / name
                    requests = tuple(
                        MergeRequest(id=form, destination=str(place / form), **fields, **asked)
                        for form, asked in forms.items()
                    )
                    for outcome in worker.run_unit(name, requests).jobs:
                        if outcome.failure is not None or outcome.report_path is None:
                            sys.exit(f"{name}, {outcome.job_id}: {outcome.failure}")
                        worker.discard(outcome.job_id)
                        reports[outcome.job_id].parent.mkdir(parents=True, exist_ok=True)
                        shutil.move(outcome.report_path / "parity.json", reports[outcome.job_id])
                for form, report in reports.items():
                    found[name, form] = ParityReport.model_validate_json(report.read_bytes())
                sys.stderr.write(f"{name}: {', '.join(forms)}\n")
    return found


def _worker(directory: Path, room: Path) -> MergeWorker:
    return MergeWorker(
        WorkerSettings(cache=directory / "cache", scratch=room / "scratch", reports=room / "reports", device="cpu")
    )


def faint(directory: Path) -> Iterator[str]:
    """Merge an adapter that is too small for the steps of its base; say what became of it, without `keep` and with it.

    The base is the real model in INT4, as a release of another adapter; the adapter is a trained one, divided by 64.

    Args:
        directory: of models and adapters.
    """
    base, trained = (
        directory / "base",
        next(iter(trained_adapters(directory / "base", directory / "adapters").values())),
    )
    with tempfile.TemporaryDirectory(dir=directory) as name:
        room = Path(name)
        shutil.copytree(trained, room / "faint")
        weights = load_file(trained / _ADAPTER_FILE)
        small = {each: tensor / 64 if ".lora_B." in each else tensor for each, tensor in weights.items()}
        save_file(small, room / "faint" / _ADAPTER_FILE)
        in_int4 = {"output": "int4_w4a16", "dtype": "bfloat16", "base_quantization": "none"}
        asked = {
            "in INT4": {"base": base, "adapter": trained, **in_int4},
            "without keep": {"base": room / "in INT4", "adapter": room / "faint", "output": "as_base"},
            "keep: 8bit": {"base": room / "in INT4", "adapter": room / "faint", "output": "as_base", "keep": "8bit"},
        }
        with contextlib.closing(_worker(room, room)) as worker:
            for what, fields in asked.items():
                policy = ParityPolicy(level="arithmetic", thresholds=Thresholds(min_survival=None))
                told = {each: str(value) for each, value in fields.items()}
                request = MergeRequest(id="faint", destination=str(room / what), parity=policy, **told)
                (outcome,) = worker.run_unit(what, (request,)).jobs
                if outcome.failure is not None:
                    yield f"{what}: {outcome.failure.message}"
                    continue
                kept = worker.publish(request.id, None).release.manifest.kept
                yield f"{what}: published{'' if kept is None else f', {kept.words}'}"


def table(reports: dict[tuple[str, str], ParityReport]) -> str:
    """Return one row for each form: over all adapters, the least and the median survival, and means of the rest."""
    lines = [
        "| form | weights quantized | delta left: least, median | KL | top-1 | NLL (base + adapter) |",
        "|---|---|---|---|---|---|",
    ]
    for form in (form for forms in _PASSES for form in forms):
        of_form = [report for (_, each), report in reports.items() if each == form]
        survivals = [check.survival for report in of_form for check in report.tensors if check.survival is not None]
        quantized = sum(check.requantization_error is not None for check in of_form[0].tensors)
        texts = [check.held_out for report in of_form for check in report.behaviour if check.gates and check.held_out]
        means = {
            name: statistics.fmean(getattr(each, name) for each in texts)
            for name in ("mean_kl", "top1_agreement", "merged_nll", "reference_nll")
        }
        left = f"{min(survivals):.1%}, {statistics.median(survivals):.1%}"
        likelihoods = f"{means['merged_nll']:.3f} ({means['reference_nll']:.3f})"
        figures = f"{means['mean_kl']:.2g} | {means['top1_agreement']:.1%} | {likelihoods}"
        lines.append(f"| {form} | {quantized} | {left} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(".bench/bases"), help="for models and adapters")
    directory = parser.parse_args().directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(table(measure(directory)) + "\n\n")
    for line in faint(directory):
        sys.stdout.write(f"- {line}\n")


if __name__ == "__main__":
    main()
