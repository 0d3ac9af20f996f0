"""Which checkpoint of a training is best: the releases of one run, by the likelihood that their parity reports have."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.ledger.records import JobRecord
from jobs.locations import Location
from jobs.parity_report import BehaviourCheck, ParityReport
from jobs.steps import step_of

_CHECKPOINT = re.compile(r"(checkpoint|ckpt|(global[-_]?)?step|epoch|iter(ation)?)s?[-_=.]?[0-9]+", re.IGNORECASE)
"""How trainers call what they save on the way. Other names that end in numbers may be of things with no order."""
_NUM_LOOKED_AT = 2
"""Names at the end of a place that may be the checkpoint's: named adapters lie in a folder of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One checkpoint of a run, merged."""

    record: JobRecord
    step: int
    nll: float
    """Of the merged checkpoint, nats for a token."""
    reference_nll: float
    """Of base + adapter."""
    mean_kl: float
    """KL(base + adapter || merged) on the prompts, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The checkpoints of one run that were merged alike, best first."""

    run: str
    base: str
    base_quantization: str
    output: str
    """What the releases are stored in."""
    num_texts: int | None
    """Held-out texts that all were measured on; None where it was the prompts and each one's own continuations."""
    base_nll: float | None
    """Of the base without an adapter on those texts."""
    rows: Sequence[Ranked]
    num_missing: int
    """Jobs of the run without such figures: not proven yet, failed, or with a report that is not here."""


def rank_sweeps(jobs: Iterable[JobRecord], read: Callable[[JobRecord], ParityReport | None]) -> list[Ranking]:
    """Return a ranking of each run of which several steps have a likelihood; runs in the order of their jobs.

    Args:
        jobs: of a batch.
        read: returns the report of a job, or None where there is none here.
    """
    runs: dict[tuple[object, ...], dict[int, list[JobRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in jobs:
        request = record.request
        if request.adapter is not None and (found := _run_of(request.adapter)) is not None:
            run, step = found
            # What is compared has to be merged, and asked, alike.
            alike = (request.pass_key(), request.output, request.parity.model_dump_json())
            runs[run, *alike][step].append(record)
    found_rankings = (_ranking(str(key[0]), steps, read) for key, steps in runs.items() if len(steps) > 1)
    return [ranking for ranking in found_rankings if ranking is not None]


def _ranking(
    run: str, steps: Mapping[int, Sequence[JobRecord]], read: Callable[[JobRecord], ParityReport | None]
) -> Ranking | None:
    known: list[tuple[int, JobRecord, ParityReport, BehaviourCheck]] = []
    num_jobs = sum(len(records) for records in steps.values())
    for step, records in steps.items():
        for record in records:
            report = read(record) if record.report_path is not None else None
            check = None if report is None else next((each for each in report.behaviour if each.gates), None)
            if report is not None and report.passed and check is not None and math.isfinite(check.merged_nll):
                known.append((step, record, report, check))
    if len({step for step, *_ in known}) < 2:
        return None
    texts = [check.held_out for *_, check in known if check.held_out is not None]
    is_held_out = len(texts) == len(known) and all(math.isfinite(each.merged_nll) for each in texts)
    rows = []
    for step, record, _, check in known:
        measured = check.held_out if is_held_out and check.held_out is not None else check
        rows.append(
            Ranked(
                record=record,
                step=step,
                nll=measured.merged_nll,
                reference_nll=measured.reference_nll,
                mean_kl=check.mean_kl,
            )
        )
    report = known[0][2]
    return Ranking(
        run=run,
        base=str(report.base),
        base_quantization=report.base_quantization.value,
        output=known[0][1].request.output.value,
        num_texts=texts[0].num_texts if is_held_out else None,
        base_nll=texts[0].base_nll if is_held_out else None,
        rows=sorted(rows, key=lambda row: (row.nll, row.step)),
        num_missing=num_jobs - len(rows),
    )


def _run_of(adapter: Location) -> tuple[str, int] | None:
    """Return the run that a checkpoint is of, as a pattern, and its step; None for what has no checkpoint's name."""
    text, at, revision = str(adapter).partition("@") if str(adapter).startswith("hf://") else (str(adapter), "", "")
    names = text.split("/")
    for number in range(len(names) - 1, max(len(names) - 1 - _NUM_LOOKED_AT, 0), -1):
        step = step_of(names[number])
        if step is not None and _CHECKPOINT.fullmatch(names[number]):
            names[number] = names[number].rstrip("0123456789") + "*"
            return "/".join(names) + at + revision, step
    return None
