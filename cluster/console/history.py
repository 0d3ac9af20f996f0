"""The history of one job: how long it was in each state, how long it took, and what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.console.remedies import REMEDIES
from jobs.ledger.pauses import Cause, Pause, Scope
from jobs.ledger.records import DriverRecord, Event, JobRecord
from jobs.states import FINAL_STATES, UNSUCCESSFUL_STATES, WAITING_STATES, JobState

_SILENT_SECONDS = 120.0
"""After which a driver that says nothing counts as lost, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What decides, beside the job itself, what comes next. Times are the store's."""

    now: float
    pauses: Sequence[Pause]
    drivers: Sequence[DriverRecord]

    @property
    def is_driven(self) -> bool:
        """Whether a driver is at work."""
        return any(each.ended_at is None and self.now - each.seen_at < _SILENT_SECONDS for each in self.drivers)


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStep:
    """What comes next."""

    kind: str
    """`turn`, `held`, `again`, `at_work`, `person`, or `none`."""
    text: str
    at: float | None = None
    """When, where that is known."""
    held_by: str | None = None
    """The pause that keeps it back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All that happened to a job."""

    steps: tuple[tuple[Event, float | None], ...]
    """Each event, with the seconds in the state that it led to; None for a final one, which lasts."""
    seconds_to_publish: float | None
    """From its submission to its release; None where there is none."""
    next_step: NextStep


def history_of(record: JobRecord, events: Sequence[Event], around: Surroundings) -> History:
    """Return the history of a job.

    Args:
        record: the job as it stands.
        events: all of them.
        around: what else decides.
    """
    steps: list[tuple[Event, float | None]] = [(one, following.at - one.at) for one, following in pairwise(events)]
    if events:
        last = events[-1]
        steps.append((last, None if last.state in FINAL_STATES else max(0.0, around.now - last.at)))
    published = [event.at for event in events if event.state is JobState.PUBLISHED]
    return History(
        steps=tuple(steps),
        seconds_to_publish=published[-1] - record.created_at if published else None,
        next_step=next_step(record, around),
    )


def next_step(record: JobRecord, around: Surroundings) -> NextStep:
    """Return what comes next for a job: by itself, or by a person."""
    if record.state in FINAL_STATES:
        return _ended(record)
    if record.state in WAITING_STATES:
        return _waiting(record, around)
    if record.lease_expires_at is not None and record.lease_expires_at < around.now:
        text = f"its driver {record.owner} says nothing any more: the next one to claim takes it over"
        return NextStep(kind="turn", text=text + _undriven(around))
    if record.state is JobState.CANCELLING:
        return NextStep(kind="at_work", text="is being stopped")
    if record.state is JobState.LEASED:
        return NextStep(kind="turn", text=f"claimed by {record.owner}: waits for a worker")
    on = f" on {record.node}" if record.node else ""
    done = f", {100 * record.bytes_done // record.bytes_total} % of its bytes" if record.bytes_total else ""
    return NextStep(kind="at_work", text=f"at work: {record.stage or 'begun'} by {record.worker}{on}{done}")


def _ended(record: JobRecord) -> NextStep:
    if record.state in UNSUCCESSFUL_STATES and record.failure_class is not None:
        remedy = REMEDIES[record.failure_class].replace("`mergefleet retry`", f"`mergefleet retry {record.id}`")
        return NextStep(kind="person", text=f"needs a person: {remedy}")
    if record.state is JobState.CANCELLED:
        return NextStep(kind="none", text="nothing: it was cancelled; `mergefleet retry` queues it again")
    return NextStep(kind="none", text="nothing: it is published")


def _waiting(record: JobRecord, around: Surroundings) -> NextStep:
    if record.state is JobState.AWAITING_APPROVAL:
        text = "needs a person: look at its parity report, then `mergefleet approve` or `mergefleet reject`"
        return NextStep(kind="person", text=text)
    covering = [pause for pause in around.pauses if pause.covers(record.request, record.batch)]
    if covering:
        # What a person paused lasts; a place that is at fault is tried by itself.
        pause = min(covering, key=lambda each: each.cause is not Cause.OPERATOR)
        return _held(pause)
    if record.state is JobState.RETRY_WAIT and record.not_before is not None and record.not_before > around.now:
        text = f"tried again after attempt {record.attempts}" if record.attempts else "tried again"
        return NextStep(kind="again", text=text + _undriven(around), at=record.not_before)
    return NextStep(kind="turn", text=f"waits for its turn{_undriven(around)}")


def _held(pause: Pause) -> NextStep:
    what = f"{pause.scope} {pause.name}".rstrip()
    if pause.cause is Cause.OPERATOR:
        why = f", {pause.reason}" if pause.reason else ""
        text = f"held by the pause of {what} ({pause.by}{why}) until `mergefleet resume {what}`"
        return NextStep(kind="held", text=text, held_by=pause.key)
    text = f"held by the pause of {what} ({pause.failure_class}: {pause.reason}); "
    if pause.probe is not None:
        return NextStep(kind="held", text=f"{text}job {pause.probe} finds out whether it works", held_by=pause.key)
    go_on = f"`mergefleet resume {Scope.PLACE} {pause.name}` does not wait for that"
    return NextStep(kind="held", text=f"{text}one job tries it; {go_on}", at=pause.probe_at, held_by=pause.key)


def _undriven(around: Surroundings) -> str:
    return "" if around.is_driven else "; no driver is at work: start one with `mergefleet run`"
