"""Views of the queue for a person at a terminal: jobs, batches, drivers, pauses, policy."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from cluster.console.display import cell, duration, line, shorten
from cluster.console.progress import base_name
from jobs.ledger.causes import FailureGroup
from jobs.ledger.pauses import Cause, Pause
from jobs.ledger.records import BatchRecord, DriverRecord, JobRecord
from jobs.policy import FailurePolicy
from jobs.states import ACTIVE_STATES, UNSUCCESSFUL_STATES, WAITING_STATES, JobState

_STYLES = {
    JobState.PUBLISHED: "green",
    JobState.FAILED: "red",
    JobState.QUARANTINED: "red",
    JobState.CANCELLED: "yellow",
    JobState.CANCELLING: "yellow",
    JobState.RETRY_WAIT: "yellow",
    JobState.AWAITING_APPROVAL: "magenta",
    JobState.QUEUED: "dim",
}


def state_style(state: JobState) -> str:
    """Return how a state is written."""
    return _STYLES.get(state, "cyan")


def state_counts(counts: Mapping[JobState, int]) -> Text:
    """Return one line: how many jobs are in each state."""
    parts = [(f"{count} {state.value}", state_style(state)) for state, count in counts.items() if count]
    if not parts:
        return Text("no jobs")
    return Text("  ").join(Text(text, style) for text, style in parts)


def job_table(records: Sequence[JobRecord]) -> Table:
    """Return one row for each job: where it is, how far, and what came of it."""
    table = Table(box=None, pad_edge=False)
    for name in ("job", "base", "adapter", "state", "stage", "done", "release or error"):
        table.add_column(name, overflow="fold", justify="right" if name == "done" else "left")
    for record in records:
        table.add_row(
            cell(record.id),
            cell(base_name(record.request)),
            cell(record.request.adapter_name),
            Text(record.state.value, state_style(record.state)),
            cell(record.stage or "" if record.state in ACTIVE_STATES else ""),
            _percent(record),
            cell(_result(record)),
        )
    return table


def _percent(record: JobRecord) -> str:
    if record.state is JobState.PUBLISHED:
        return "100%"
    return f"{100 * record.bytes_done // record.bytes_total}%" if record.bytes_total else ""


def _result(record: JobRecord) -> str:
    if record.release is not None:
        kept = record.release.manifest.kept
        return f"{record.release.location}{'' if kept is None else f'  {kept.words}'}"
    if record.failure_class is None:
        return ""
    return f"{record.failure_class}: {shorten(record.failure_message or '')}"


def failure_table(groups: Sequence[FailureGroup]) -> Table:
    """Return one row for each cause of failures: how many jobs it had, which, and what it is."""
    table = Table(box=None, pad_edge=False)
    table.add_column("failed", justify="right")
    for name in ("class", "cause", "jobs"):
        table.add_column(name, overflow="fold")
    for each in groups:
        more = f" and {each.num_jobs - len(each.ids)} more" if each.num_jobs > len(each.ids) else ""
        table.add_row(
            str(each.num_jobs),
            cell(each.failure_class),
            cell(shorten(each.message)),
            cell(", ".join(each.ids) + more),
        )
    return table


def pause_line(pause: Pause, now: float | None = None) -> Text:
    """Return what is paused, why, and when it is tried again, in one line."""
    what = f"{pause.scope} {pause.name}".rstrip()
    if pause.cause is Cause.OPERATOR:
        why = f"by {pause.by}" + (f": {pause.reason}" if pause.reason else "")
    else:
        why = f"{pause.failure_class}: {shorten(pause.reason)}"
    tried = ""
    if pause.probe is not None:
        tried = f"  {pause.probe} finds out whether it works again"
    elif pause.probe_at is not None and now is not None:
        tried = f"  tried again in {duration(max(0.0, pause.probe_at - now))}"
    return line(f"paused: {what}  {why}{tried}", "yellow")


def batch_table(batches: Sequence[BatchRecord]) -> Table:
    """Return one row for each batch: how many of its jobs are published, failed, at work, waiting."""
    table = Table(box=None, pad_edge=False)
    table.add_column("batch", overflow="fold")
    table.add_column("since (UTC)")
    for name in ("total", "published", "failed", "cancelled", "at work", "waiting"):
        table.add_column(name, justify="right")
    for each in batches:
        counts = each.counts
        numbers = (
            sum(counts.values()),
            counts[JobState.PUBLISHED],
            sum(counts[state] for state in UNSUCCESSFUL_STATES),
            counts[JobState.CANCELLED],
            sum(counts[state] for state in ACTIVE_STATES),
            sum(counts[state] for state in WAITING_STATES),
        )
        table.add_row(cell(each.name), _time(each.created_at), *map(str, numbers))
    return table


def driver_table(drivers: Sequence[DriverRecord], now: float) -> Table:
    """Return one row for each driver: where it is, how many jobs it holds, when it was last seen."""
    table = Table(box=None, pad_edge=False)
    for name in ("driver", "host", "process", "since (UTC)", "jobs", "seen"):
        table.add_column(name, overflow="fold", justify="right" if name in {"process", "jobs"} else "left")
    for each in drivers:
        seen = "ended" if each.ended_at is not None else f"{duration(max(0.0, now - each.seen_at))} ago"
        table.add_row(
            cell(each.owner), cell(each.host), str(each.pid), _time(each.started_at), str(each.num_leases), seen
        )
    return table


def policy_table(policy: FailurePolicy) -> Table:
    """Return one row for each class of failure: what follows it."""
    table = Table(box=None, pad_edge=False)
    for name in ("class", "attempts", "first wait up to", "longest wait", "pauses its place", "alone next"):
        table.add_column(name, justify="right" if name in {"attempts", "first wait up to", "longest wait"} else "left")
    for failure, each in policy.by_class.items():
        again = each.attempts > 1 or each.pauses_place
        table.add_row(
            failure.value,
            str(each.attempts),
            duration(each.delay_seconds) if again else "",
            duration(each.max_delay_seconds) if again else "",
            "yes, and no attempt counts" if each.pauses_place else "",
            "yes" if each.alone else "",
        )
    return table


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"
