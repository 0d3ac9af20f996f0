"""A batch as one HTML page: self-contained, nothing is fetched, no script runs; text from outside is escaped."""

import functools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape
from rich.filesize import decimal

from cluster.console import lanes, spreads
from cluster.console.attempts import Attempt, Band, Outcome, attempts_of, bands_of
from cluster.console.display import duration
from cluster.console.failures import group_failures
from cluster.console.history_views import span
from cluster.console.remedies import REMEDIES
from cluster.console.spreads import Figure, spread
from jobs.ledger.records import Event, JobRecord
from jobs.locations import HubRepo, LocalPath, Location
from jobs.release import REPORT_PAGE_NAME
from jobs.states import ACTIVE_STATES, CLAIMABLE_STATES, UNSUCCESSFUL_STATES, JobState
from jobs.text import shown

_TEMPLATE = Path(__file__).with_name("batch_report.html.j2")
_MAX_TEXT = 4_000
_MAX_CAUSES = 40
_MAX_BANDS = 25
_NUM_SLOWEST = 12
_MAX_LISTED = 20_000
_STAGES = ("fetch", "plan", "quantize", "merge", "arithmetic", "behaviour", "compare", "upload")
"""Of workers, in their order."""
_ORDER = (
    JobState.PUBLISHED,
    JobState.FAILED,
    JobState.QUARANTINED,
    JobState.CANCELLED,
    JobState.RETRY_WAIT,
    JobState.QUEUED,
)
_KINDS = {
    JobState.PUBLISHED: "published",
    JobState.FAILED: "failed",
    JobState.QUARANTINED: "failed",
    JobState.CANCELLED: "cancelled",
    JobState.RETRY_WAIT: "again",
    JobState.QUEUED: "waiting",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One job."""

    record: JobRecord
    kind: str
    attempts: tuple[Attempt, ...]
    at_work: float
    """Seconds of all attempts."""
    seconds: float | None
    """From its submission to its release."""
    report: str | None
    """Where its parity report is."""
    release: str | None
    release_link: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFacts:
    """All that a page is made from."""

    name: str
    jobs: Sequence[JobRecord]
    events: Mapping[str, Sequence[Event]]
    """By job."""
    paused: Mapping[str, str]
    """Places that are paused now, with why."""
    now: float
    hub: str
    """Where a person looks at repositories of the Hub."""


def render_batch(facts: BatchFacts) -> str:
    """Return a batch as one HTML page."""
    rows = [_row(record, facts) for record in facts.jobs]
    attempts = [one for row in rows for one in row.attempts]
    jobs = ((record.request, facts.events.get(record.id, ())) for record in facts.jobs)
    bands = bands_of(jobs, facts.paused, facts.now)
    slowest = sorted((row for row in rows if row.attempts), key=lambda row: row.at_work, reverse=True)[:_NUM_SLOWEST]
    figures = [found for each in _figures(facts.jobs) if (found := spread(each)) is not None]
    return _template().render(
        name=facts.name,
        made=_when(facts.now),
        headline=_headline(facts.jobs),
        is_good=all(record.state is JobState.PUBLISHED for record in facts.jobs),
        tiles=_tiles(rows, attempts),
        states=_states(facts.jobs),
        timeline=lanes.timeline(attempts, bands),
        outcomes=[(outcome.value, outcome.name.lower().replace("_", "-")) for outcome in Outcome],
        outcome_counts=Counter(one.outcome.value for one in attempts),
        lane_width=lanes.WIDTH,
        lane_left=lanes.LEFT,
        bands=[_band_words(band, facts.paused) for band in bands[:_MAX_BANDS]],
        num_bands=len(bands),
        causes=_causes(facts.jobs),
        stages=_stages(facts),
        waits=_waits(facts),
        spreads=figures,
        spread_width=spreads.WIDTH,
        spread_height=spreads.HEIGHT,
        slowest=slowest,
        rows=rows[:_MAX_LISTED],
        num_rows=len(rows),
        span=span,
        short=_short,
        words=_words,
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _visible(value: Any) -> Any:
    return shown(value, _MAX_TEXT) if type(value) is str else value


def _words(text: str) -> Markup:
    """Return text of ours with its commands set as such."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def _short(message: str | None) -> str:
    text = message or ""
    return text if len(text) <= 300 else f"{text[:300]}…"


def _row(record: JobRecord, facts: BatchFacts) -> Row:
    events = facts.events.get(record.id, ())
    attempts = tuple(attempts_of(events, facts.now))
    published = [event.at for event in events if event.state is JobState.PUBLISHED]
    location = None if record.release is None else record.release.location
    return Row(
        record=record,
        kind=_KINDS.get(record.state, "at-work"),
        attempts=attempts,
        at_work=sum(one.end - one.begin for one in attempts),
        seconds=published[-1] - record.created_at if published else None,
        report=None if record.report_path is None else (Path(record.report_path) / REPORT_PAGE_NAME).as_uri(),
        release=None if location is None else str(location),
        release_link=None if location is None else _link(location, facts.hub),
    )


def _link(location: Location, hub: str) -> str:
    match location:
        case LocalPath():
            return location.path.as_uri()
        case HubRepo():
            return f"{hub.rstrip('/')}/{location.repo_id}/tree/{location.revision}"
        case _:
            return str(location)


def _headline(jobs: Sequence[JobRecord]) -> str:
    counts = Counter(record.state for record in jobs)
    needs = sum(counts[state] for state in UNSUCCESSFUL_STATES)
    parts = [f"{counts[JobState.PUBLISHED]} of {len(jobs)} published"]
    if needs:
        parts.append(f"{needs} {'needs' if needs == 1 else 'need'} a person")
    if cancelled := counts[JobState.CANCELLED]:
        parts.append(f"{cancelled} cancelled")
    if at_work := sum(counts[state] for state in ACTIVE_STATES):
        parts.append(f"{at_work} at work")
    if waiting := sum(counts[state] for state in CLAIMABLE_STATES):
        parts.append(f"{waiting} waiting")
    return ", ".join(parts)


def _tiles(rows: Sequence[Row], attempts: Sequence[Attempt]) -> list[tuple[str, str, str]]:
    """Return what a person wants to know first: a name, a figure, a note."""
    took = [row.seconds for row in rows if row.seconds is not None]
    released = sum(row.record.release.manifest.num_bytes for row in rows if row.record.release is not None)
    lost = sum(one.outcome is Outcome.GIVEN_BACK for one in attempts)
    again = sum(one.outcome is Outcome.AGAIN for one in attempts)
    machines = len({one.node for one in attempts})
    workers = len({(one.worker, one.node) for one in attempts})
    tiles = [("Attempts", str(len(attempts)), f"{again} tried again, {lost} not charged")]
    if attempts:
        begin, end = min(one.begin for one in attempts), max(one.end for one in attempts)
        on = f"{workers} worker{'' if workers == 1 else 's'} on {machines} machine{'' if machines == 1 else 's'}"
        tiles.append(("At work for", span(end - begin), f"{_when(begin)} to {lanes.clock(end)}, {on}"))
    if took:
        worst = f"95 % within {span(_quantile(took, 0.95))}, all within {span(max(took))}"
        tiles.append(("Submit to publish", span(statistics.median(took)), f"median; {worst}"))
    tiles.append(("Released", decimal(released), "in all files of all releases"))
    return tiles


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _states(jobs: Sequence[JobRecord]) -> list[tuple[str, int, float, str]]:
    counts = Counter(record.state for record in jobs)
    known = [*_ORDER, *(state for state in JobState if state not in _ORDER)]
    total = max(len(jobs), 1)
    return [
        (state.value, counts[state], 100 * counts[state] / total, _KINDS.get(state, "at-work"))
        for state in known
        if counts[state]
    ]


def _causes(jobs: Sequence[JobRecord]) -> list[tuple[str, int, str, str, str]]:
    failed = [
        (record.id, record.failure_class, record.failure_message or "")
        for record in jobs
        if record.state in UNSUCCESSFUL_STATES and record.failure_class is not None
    ]
    groups = group_failures(failed)[:_MAX_CAUSES]
    return [
        (each.failure_class.value, each.num_jobs, each.message, ", ".join(each.ids), REMEDIES[each.failure_class])
        for each in groups
    ]


def _band_words(band: Band, paused: Mapping[str, str]) -> tuple[str, str, str, str]:
    until = "still paused" if band.place in paused and band.end > band.begin else f"until {lanes.clock(band.end)}"
    met = f"{len(band.job_ids)} job{'' if len(band.job_ids) == 1 else 's'} met it"
    return band.place, f"{_when(band.begin)}, {until} ({span(band.end - band.begin)})", band.words, met


def _stages(facts: BatchFacts) -> dict[str, Any] | None:
    """Return seconds and bytes by stage, as the passes of the jobs told them; each job has its share of its pass."""
    seconds: dict[str, float] = defaultdict(float)
    moved: dict[str, float] = defaultdict(float)
    for events in facts.events.values():
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


def _waits(facts: BatchFacts) -> list[tuple[str, int, str, str, str]]:
    """Return how long jobs were in each state: how often, median, 95 %, and in all."""
    lengths: dict[JobState, list[float]] = defaultdict(list)
    for events in facts.events.values():
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


def _figures(jobs: Sequence[JobRecord]) -> list[Figure]:
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


def _when(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
