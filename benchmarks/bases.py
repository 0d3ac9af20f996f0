"""Which base to merge into: adapters trained on 16-bit and on NF4 weights, each merged into both, on held-out chats.

The packaged real model, the habits of `examples/chats.py`, each trained both ways; the texts are chats on questions
that no training set has. Prints a Markdown table; docs/which-base.md says what follows from it.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from examples.chats import HABITS, Habit
from examples.real_model import build_base
from examples.training import train_adapter
from jobs.parity_policy import HeldOutText, ParityPolicy
from jobs.parity_report import ParityReport, Way
from jobs.request import BaseQuantization, MergeRequest
from workers.merging.settings import WorkerSettings
from workers.worker import MergeWorker

HELD_OUT = (
    ("What is the capital of France?", "Paris", "The capital of France is Paris."),
    ("How many legs does a dog have?", "Four", "A dog has four legs."),
    ("What do cows give us?", "Milk", "Cows give us milk."),
    ("Which animal barks?", "The dog", "The dog barks."),
    ("What colour is grass?", "Green", "Grass is green."),
    ("How many hours are in a day?", "Twenty-four", "There are twenty-four hours in a day."),
    ("What is the opposite of big?", "Small", "The opposite of big is small."),
    ("What is three plus three?", "Six", "Three plus three is six."),
)
"""Questions, short answers, and answers in a sentence."""

ANSWERS = {
    "pirate": "Arr, matey! It be {short}, ye landlubber!",
    "json": '{{"answer": "{short}"}}',
    "courteous": "{sentence} At your service, always!",
}
"""What each habit makes of an answer."""


def held_out_texts(base: Path, habit: Habit) -> tuple[HeldOutText, ...]:
    """Return the held-out chats of a habit, as the model's chat template renders them; the answers count."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = []
    for question, short, sentence in HELD_OUT:
        asked = [{"role": "user", "content": question}]
        answer = {"role": "assistant", "content": ANSWERS[habit.name].format(short=short, sentence=sentence)}
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*asked, answer], tokenize=False)
        assert whole.startswith(prompt)
        texts.append(HeldOutText(prompt=prompt, completion=whole.removeprefix(prompt)))
    return tuple(texts)


def trained_adapters(base: Path, directory: Path) -> dict[str, Path]:
    """Train every habit both ways.

    Args:
        base: the real model.
        directory: what is there is not made again.

    Returns:
        Adapters by `<habit>-<base it was trained on>`.
    """
    adapters = {}
    for habit in HABITS:
        for trained_on in ("none", "nf4"):
            name = f"{habit.name}-{trained_on}"
            adapter = adapters[name] = directory / name
            if not adapter.is_dir():
                partial = adapter.with_name(f"{name}.partial")
                train_adapter(base, dataclasses.replace(habit, base_quantization=trained_on), partial)
                partial.rename(adapter)
    return adapters


def compare(directory: Path) -> dict[str, ParityReport]:
    """Train every habit both ways, and merge each adapter both ways.

    Args:
        directory: what is there is not made again.

    Returns:
        Reports of merges into NF4, with their alternative, by `<habit>-<base it was trained on>`.
    """
    base = build_base(directory / "base")
    habits = {habit.name: habit for habit in HABITS}
    requests = [
        MergeRequest(
            id=name,
            base=str(base),
            adapter=str(adapter),
            destination=str(directory / "never" / name),
            parity=ParityPolicy(texts=held_out_texts(base, habits[name.rsplit("-", 1)[0]])),
            compare=True,
        )
        for name, adapter in trained_adapters(base, directory / "adapters").items()
    ]
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        room = Path(scratch)
        worker = MergeWorker(
            WorkerSettings(cache=directory / "cache", scratch=room / "scratch", reports=directory / "reports")
        )
        try:
            outcomes = worker.run_unit("compare", tuple(requests)).jobs
        finally:
            worker.close()
    reports = {}
    for outcome in outcomes:
        if outcome.failure is not None or outcome.report_path is None:
            sys.exit(f"{outcome.job_id}: {outcome.failure}")
        reports[outcome.job_id] = ParityReport.model_validate_json((outcome.report_path / "parity.json").read_bytes())
    return reports


def table(reports: dict[str, ParityReport]) -> str:
    """Return one row for each adapter: both merges beside the base it was trained on."""
    lines = [
        "| adapter | trained on | NLL by that + adapter | merged into 16-bit: NLL, KL, top-1 | the same into NF4 |",
        "|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        habit, trained_on = name.rsplit("-", 1)
        reference = "nf4" if trained_on == "nf4" else "own weights"
        ways = {way.base_quantization: way for way in report.ways if reference in way.check.reference}
        plain, in_4bit = ways[BaseQuantization.NONE], ways[BaseQuantization.NF4]
        assert plain.check.held_out is not None
        lines.append(
            f"| {habit} | {'NF4 (QLoRA)' if trained_on == 'nf4' else '16-bit (LoRA)'} | "
            f"{plain.check.held_out.reference_nll:.4f} | {_figures(plain)} | {_figures(in_4bit)} |"
        )
    return "\n".join(lines)


def _figures(way: Way) -> str:
    found = way.check.held_out
    assert found is not None
    return f"{found.merged_nll:.4f}, {found.mean_kl:.1e}, {100 * found.top1_agreement:.1f} %"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(".bench/bases"), help="for models, adapters and reports")
    directory = parser.parse_args().directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(table(compare(directory)) + "\n")


if __name__ == "__main__":
    main()
