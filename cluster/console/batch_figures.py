"""The figures of a batch's page: how many, how long, how much, and how near the releases are to what they should be."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from rich.filesize import decimal

from cluster.console import lanes
from cluster.console.attempts import Attempt, Outcome
from cluster.console.display import duration
from cluster.console.history_views import span
from cluster.console.spreads import Figure
from jobs.ledger.records import Event, JobRecord
from jobs.states import JobState

_STAGES = ("fetch", "plan", "quantize", "merge", "arithmetic", "behaviour", "compare", "upload")
"""Of workers, in their order."""
_ORDER = (
    JobState.PUBLISHED,
    JobState.FAILED,
    JobState.QUARANTINED,
    JobState.CANCELLED,
    JobState.AWAITING_APPROVAL,
    JobState.RETRY_WAIT,
    JobState.QUEUED,
)
_KINDS = {
    JobState.PUBLISHED: "published",
    JobState.FAILED: "failed",
    JobState.QUARANTINED: "failed",
    JobState.CANCELLED: "cancelled",
    JobState.AWAITING_APPROVAL: "waiting",
    JobState.RETRY_WAIT: "again",
    JobState.QUEUED: "waiting",
}


def tiles(jobs: Sequence[JobRecord], took: Sequence[float], attempts: Sequence[Attempt]) -> list[tuple[str, str, str]]:
    """Return what a person wants to know first: a name, a figure, a note.

    Args:
        jobs: of the batch.
        took: seconds from submission to release, of those that have one.
        attempts: at all of them.
    """
    released = sum(record.release.manifest.num_bytes for record in jobs if record.release is not None)
    lost = sum(one.outcome is Outcome.GIVEN_BACK for one in attempts)
    again = sum(one.outcome is Outcome.AGAIN for one in attempts)
    machines = len({one.node for one in attempts})
    workers = len({(one.worker, one.node) for one in attempts})
    tiles = [("Attempts", str(len(attempts)), f"{again} tried again, {lost} not charged")]
    if attempts:
        begin, end = min(one.begin for one in attempts), max(one.end for one in attempts)
        on = f"{workers} worker{'' if workers == 1 else 's'} on {machines} machine{'' if machines == 1 else 's'}"
        tiles.append(("At work for", span(end - begin), f"{when(begin)} to {lanes.clock(end)}, {on}"))
    if took:
        worst = f"95 % within {span(_quantile(took, 0.95))}, all within {span(max(took))}"
        tiles.append(("Submit to publish", span(statistics.median(took)), f"median; {worst}"))
    tiles.append(("Released", decimal(released), "in all files of all releases"))
    return tiles


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def kind_of(state: JobState) -> str:
    """Return how a state is drawn."""
    return _KINDS.get(state, "at-work")


def states(jobs: Sequence[JobRecord]) -> list[tuple[str, int, float, str]]:
    """Return the states that jobs are in: name, number, share in percent, and how each is drawn."""
    counts = Counter(record.state for record in jobs)
    known = [*_ORDER, *(state for state in JobState if state not in _ORDER)]
    total = max(len(jobs), 1)
    return [
        (state.value, counts[state], 100 * counts[state] / total, kind_of(state)) for state in known if counts[state]
    ]


def stages(of_jobs: Mapping[str, Sequence[Event]]) -> dict[str, Any] | None:
    """Return seconds and bytes by stage, as the passes of the jobs told them; each job has its share of its pass."""
    seconds: dict[str, float] = defaultdict(float)
    moved: dict[str, float] = defaultdict(float)
    for events in of_jobs.values():
        for event in events:
            unit = event.detail.get("unit")
            if not isinstance(unit, dict):
                continue
            jobs = max(_number(unit.get("jobs")), 1.0)
            stages = unit.get("seconds")
            for stage, value in stages.items() if isinstance(stages, dict) else ():
                seconds[stage] += _number(value) / jobs
            for name in ("bytes_read", "bytes_written", "bytes_uploaded"):
                moved[name.removeprefix("bytes_")] += _number(unit.get(name)) / jobs
    if not seconds:
        return None
    names = [*(name for name in _STAGES if seconds.get(name)), *sorted(seconds.keys() - set(_STAGES))]
    most = max(seconds.values()) or 1.0
    return {
        "seconds": [(name, span(seconds[name]), 100 * seconds[name] / most) for name in names],
        "bytes": [(name, decimal(int(value))) for name, value in moved.items()],
    }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def waits(of_jobs: Mapping[str, Sequence[Event]]) -> list[tuple[str, int, str, str, str]]:
    """Return how long jobs were in each state: how often, median, 95 %, and in all."""
    lengths: dict[JobState, list[float]] = defaultdict(list)
    for events in of_jobs.values():
        for one, following in pairwise(events):
            lengths[one.state].append(following.at - one.at)
    return [
        (
            state.value,
            len(lengths[state]),
            span(statistics.median(lengths[state])),
            span(_quantile(lengths[state], 0.95)),
            duration(sum(lengths[state])),
        )
        for state in JobState
        if lengths.get(state)
    ]


def figures(jobs: Sequence[JobRecord]) -> list[Figure]:
    """Return the figures of parity, of all releases."""
    released = [(record, record.release.manifest.parity) for record in jobs if record.release is not None]
    limits = [record.request.parity.thresholds for record, _ in released]

    def values(read: Callable[[Any], float | None]) -> list[tuple[str, float]]:
        found = ((record.id, read(parity)) for record, parity in released)
        return [(job_id, value) for job_id, value in found if value is not None]

    def common(read: Callable[[Any], float]) -> float | None:
        known = {read(each) for each in limits}
        return known.pop() if len(known) == 1 else None

    return [
        Figure(
            title="Worst rounding",
            note="largest difference from base + delta in any element, in units of what one rounding may leave",
            values=values(lambda parity: parity.rounding_excess),
            limit=common(lambda each: each.max_rounding_excess),
        ),
        Figure(
            title="Mean KL divergence",
            note="base + adapter to the merged checkpoint, nats",
            values=values(lambda parity: parity.mean_kl),
            limit=common(lambda each: each.max_mean_kl),
            is_log=True,
        ),
        Figure(
            title="Top-1 agreement",
            note="share of positions with the same most likely token",
            values=values(lambda parity: parity.top1_agreement),
            limit=common(lambda each: each.min_top1_agreement),
            is_best_high=True,
        ),
        Figure(
            title="Least survival of a delta",
            note="how much of the delta of the worst tensor is left after rounding; 1 is all of it",
            values=values(lambda parity: parity.min_survival),
            limit=None,
            is_best_high=True,
        ),
    ]


def when(at: float) -> str:
    """Return a moment (UTC)."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
