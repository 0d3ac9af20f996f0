"""A batch as one HTML page: self-contained, nothing is fetched, no script runs; text from outside is escaped."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from cluster.console import batch_figures, lanes, spreads
from cluster.console.attempts import Attempt, Band, Outcome, attempts_of, bands_of
from cluster.console.history_views import span
from cluster.console.remedies import REMEDIES
from cluster.console.spreads import spread
from cluster.console.sweep_ranking import Ranking
from jobs.ledger.causes import group_failures
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
_MAX_RANKED = 200
_MAX_LISTED = 20_000


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
    rankings: Sequence[Ranking] = ()
    """Of the runs that jobs of the batch are checkpoints of."""


def render_batch(facts: BatchFacts) -> str:
    """Return a batch as one HTML page."""
    rows = [_row(record, facts) for record in facts.jobs]
    attempts = [one for row in rows for one in row.attempts]
    jobs = ((record.request, facts.events.get(record.id, ())) for record in facts.jobs)
    bands = bands_of(jobs, facts.paused, facts.now)
    slowest = sorted((row for row in rows if row.attempts), key=lambda row: row.at_work, reverse=True)[:_NUM_SLOWEST]
    figures = [found for each in batch_figures.figures(facts.jobs) if (found := spread(each)) is not None]
    return _template().render(
        name=facts.name,
        made=batch_figures.when(facts.now),
        headline=_headline(facts.jobs),
        is_good=all(record.state is JobState.PUBLISHED for record in facts.jobs),
        tiles=batch_figures.tiles(facts.jobs, [row.seconds for row in rows if row.seconds is not None], attempts),
        states=batch_figures.states(facts.jobs),
        timeline=lanes.timeline(attempts, bands),
        outcomes=[(outcome.value, outcome.name.lower().replace("_", "-")) for outcome in Outcome],
        outcome_counts=Counter(one.outcome.value for one in attempts),
        lane_width=lanes.WIDTH,
        lane_left=lanes.LEFT,
        bands=[_band_words(band, facts.paused) for band in bands[:_MAX_BANDS]],
        num_bands=len(bands),
        causes=_causes(facts.jobs),
        stages=batch_figures.stages(facts.events),
        waits=batch_figures.waits(facts.events),
        spreads=figures,
        rankings=facts.rankings,
        link=lambda location: _link(location, facts.hub),
        page_of=_page_of,
        exact="{:.4f}".format,
        rough="{:.2g}".format,
        max_ranked=_MAX_RANKED,
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
        kind=batch_figures.kind_of(record.state),
        attempts=attempts,
        at_work=sum(one.end - one.begin for one in attempts),
        seconds=published[-1] - record.created_at if published else None,
        report=_page_of(record),
        release=None if location is None else str(location),
        release_link=None if location is None else _link(location, facts.hub),
    )


def _page_of(record: JobRecord) -> str | None:
    return None if record.report_path is None else (Path(record.report_path) / REPORT_PAGE_NAME).as_uri()


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
    if to_approve := counts[JobState.AWAITING_APPROVAL]:
        parts.append(f"{to_approve} to be approved")
    if waiting := sum(counts[state] for state in CLAIMABLE_STATES):
        parts.append(f"{waiting} waiting")
    return ", ".join(parts)


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
    return band.place, f"{batch_figures.when(band.begin)}, {until} ({span(band.end - band.begin)})", band.words, met
