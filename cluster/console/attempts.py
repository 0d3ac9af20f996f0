"""Attempts and pauses of places, as the events of jobs tell them: from when to when, where, and how they ended."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from jobs.ledger.records import Event
from jobs.places import is_covered, locations_of
from jobs.request import MergeRequest
from jobs.states import STAGES, JobState

_NODE = "node:"
_WAY = {state: number for number, state in enumerate((JobState.LEASED, *STAGES, JobState.PUBLISHED))}
"""How far a job is, by state."""


class Outcome(StrEnum):
    """How an attempt ended."""

    PUBLISHED = "published"
    FAILED = "failed"
    AGAIN = "tried again"
    """It failed and counts; another follows."""
    GIVEN_BACK = "not charged"
    """A place, a worker or others ended it, and it does not count."""
    PROVEN = "waits for approval"
    CANCELLED = "cancelled"
    AT_WORK = "at work"


_OUTCOMES = {
    JobState.PUBLISHED: Outcome.PUBLISHED,
    JobState.FAILED: Outcome.FAILED,
    JobState.QUARANTINED: Outcome.FAILED,
    JobState.AWAITING_APPROVAL: Outcome.PROVEN,
    JobState.CANCELLED: Outcome.CANCELLED,
    JobState.RETRY_WAIT: Outcome.AGAIN,
    JobState.QUEUED: Outcome.GIVEN_BACK,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt at one job. Times are seconds since 1970."""

    job_id: str
    worker: str
    node: str
    begin: float
    end: float
    outcome: Outcome
    words: str
    """Why it ended so; nothing where it was published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A time in which a place was at fault, as the jobs of one batch met it."""

    place: str
    begin: float
    end: float
    words: str
    job_ids: tuple[str, ...]
    """Those that met it."""


def attempts_of(events: Sequence[Event], now: float) -> list[Attempt]:
    """Return the attempts at one job, from all its events in order."""
    found: list[Attempt] = []
    begun: Event | None = None
    for event in events:
        if event.state is JobState.PLANNING:
            begun = event
        elif begun is not None and event.state in _OUTCOMES:
            found.append(_attempt(begun, event.at, _outcome(event), _words(event)))
            begun = None
    if begun is not None:
        found.append(_attempt(begun, now, Outcome.AT_WORK, ""))
    return found


def _attempt(begun: Event, end: float, outcome: Outcome, words: str) -> Attempt:
    worker, node = begun.detail.get("worker"), begun.detail.get("node")
    return Attempt(
        job_id=begun.job_id,
        worker=str(worker or "?"),
        node=str(node or "?"),
        begin=begun.at,
        end=end,
        outcome=outcome,
        words=words,
    )


def _outcome(event: Event) -> Outcome:
    # What is charged says whether it cost a worker; what only has to wait gives a reason.
    is_excused = event.state is JobState.RETRY_WAIT and "worker_lost" not in event.detail
    return Outcome.GIVEN_BACK if is_excused else _OUTCOMES[event.state]


def _words(event: Event) -> str:
    detail = event.detail
    parts = [detail.get(name) for name in ("reason", "failure", "message")]
    return ": ".join(str(part) for part in parts if part)


def bands_of(
    jobs: Iterable[tuple[MergeRequest, Sequence[Event]]], paused: Iterable[str], now: float
) -> tuple[Band, ...]:
    """Return when places were at fault, in the order of their begin.

    A place is at fault from the first job that met it on. It works again when the job that was sent ahead gets further
    than that one, or when another job that needs it is claimed: such jobs are held meanwhile.

    Args:
        jobs: of one batch, each with all its events.
        paused: places that are paused still.
        now: until when those are drawn.
    """
    known = list(jobs)
    faults = [fault for _, events in known for fault in _faults(events)]
    bands: list[Band] = []
    for place in dict.fromkeys(place for place, _, _ in faults):
        met = sorted(((event.at, way, event) for each, way, event in faults if each == place), key=lambda one: one[0])
        passed = sorted(_passings(place, known, min(way for _, way, _ in met)))
        bands += _bands(place, [(at, event) for at, _, event in met], passed, now if place in set(paused) else None)
    return tuple(sorted(bands, key=lambda band: band.begin))


def _faults(events: Sequence[Event]) -> Iterable[tuple[str, int, Event]]:
    """Yield the faults of places that one job met: the place, how far it was, and the event."""
    way = 0
    for event in events:
        place = event.detail.get("place")
        if isinstance(place, str) and "delay_seconds" not in event.detail:  # else others got past it, and it went on
            yield place, way, event
        way = _WAY.get(event.state, 0)


def _passings(place: str, jobs: Sequence[tuple[MergeRequest, Sequence[Event]]], way: int) -> Iterable[float]:
    """Yield when jobs showed that a place works, were it at fault before."""
    for request, events in jobs:
        is_node = place.startswith(_NODE)
        if not is_node and not any(is_covered(location, place) for location in locations_of(request)):
            continue
        tries = False
        for event in events:
            if event.state is JobState.LEASED:
                told = event.detail.get("tries")
                tries = isinstance(told, list) and place in told
                if not tries and not is_node:
                    yield event.at
            elif event.state is JobState.PLANNING and is_node:
                tries = event.detail.get("node") == place.removeprefix(_NODE)
            if tries and _WAY.get(event.state, -1) > way:
                yield event.at


def _bands(
    place: str, met: Sequence[tuple[float, Event]], passed: Sequence[float], lasts_until: float | None
) -> list[Band]:
    found: list[Band] = []
    group: list[tuple[float, Event]] = []
    ends = iter(passed)
    end = next(ends, None)
    for at, event in met:
        while end is not None and end <= (group[-1][0] if group else at):
            end = next(ends, None)
        if group and end is not None and end < at:
            found.append(_band(place, group, end))
            group = []
        group.append((at, event))
    while end is not None and end <= group[-1][0]:
        end = next(ends, None)
    last = end if end is not None else lasts_until
    return [*found, _band(place, group, group[-1][0] if last is None else last)]


def _band(place: str, group: Sequence[tuple[float, Event]], end: float) -> Band:
    detail: Mapping[str, object] = group[0][1].detail
    return Band(
        place=place,
        begin=group[0][0],
        end=end,
        words=f"{detail.get('failure')}: {detail.get('message')}",
        job_ids=tuple(dict.fromkeys(event.job_id for _, event in group)),
    )
