"""Views for a person at a terminal. They take values and return Rich renderables; they decide and fetch nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.console.progress import BaseProgress
from cluster.driving.events import (
    DriverEvent,
    JobSettled,
    PlacePaused,
    PlaceResumed,
    ShardsStarted,
    Summary,
    UnitStarted,
    WorkerBenched,
)
from jobs.parity_report import Way
from jobs.release import Manifest
from jobs.states import JobState
from jobs.text import MAX_MESSAGE, shown

if TYPE_CHECKING:
    from workers.unit.estimate import Estimate, Preview

_MAX_MESSAGE = 200
_MAX_CELL = 400


def preview_table(previews: "Sequence[Preview]") -> Table:
    """Return one row for each request that can be merged: what changes, into what, and what it takes."""
    table = Table(box=None, pad_edge=False)
    for name in ("request", "merges into"):
        table.add_column(name, overflow="fold")
    for name in ("tensors changed", "parameters", "reads", "writes", "memory", "time"):
        table.add_column(name, justify="right")
    for each in previews:
        if each.estimate is not None:
            it = each.estimate
            table.add_row(
                cell(
                    each.request.id
                    if each.request.combination is None
                    else f"{each.request.id}: {each.request.adapter_words}"
                ),
                cell(it.merges_into),
                f"{it.num_changed_tensors} of {it.num_tensors}",
                f"{it.num_changed_parameters / it.num_parameters:.1%}",
                decimal(it.bytes_read),
                decimal(it.bytes_written),
                _memory(it),
                duration(it.seconds),
            )
    return table


def note_line(about: object, note: str) -> Text:
    """Return what a person should know before a release is used, in one line."""
    return Text(shown(f"{about}  note: {note}", MAX_MESSAGE), "yellow")


def _memory(estimate: "Estimate") -> str:
    on_gpu = f" and {decimal(estimate.peak_device_memory_bytes)} GPU" if estimate.peak_device_memory_bytes else ""
    return decimal(estimate.peak_memory_bytes) + on_gpu


def shorten(message: str) -> str:
    """Return a message cut to what fits a table."""
    text = shown(message, _MAX_MESSAGE + 1)
    return text if len(message) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}…"


def cell(text: str) -> Text:
    """Return text from outside as a cell of a table: neither markup nor control characters act."""
    return Text(shown(text, _MAX_CELL))


def line(text: str, style: str) -> Text:
    """Return a line with text from outside."""
    return Text(shown(text, MAX_MESSAGE, lines=True), style)


def board(progress: Sequence[BaseProgress], seconds_left: float | None, beside: Sequence[Text] = ()) -> RenderableType:
    """Return a bar for each base, what its jobs are at, lines about what else matters, and the time left."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for each in progress:
        table.add_row(
            cell(each.name),
            ProgressBar(total=each.bytes_total, completed=each.bytes_done, width=30, pulse=each.bytes_total is None),
            _bytes(each.bytes_done, each.bytes_total),
            f"{each.num_final}/{each.num_jobs} jobs",
            line("  ".join(f"{count} {stage}" for stage, count in sorted(each.stages.items())), "dim"),
        )
    left = "time left: not known yet" if seconds_left is None else f"time left: about {duration(seconds_left)}"
    return Group(table, *beside, Text(left, "dim"))


def _bytes(done: int, total: int | None) -> str:
    return "" if total is None else f"{decimal(done)} / {decimal(total)}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `8 s`, `3 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def event_line(event: DriverEvent) -> Text:
    """Return one line for one event of a driver."""
    if isinstance(event, UnitStarted | ShardsStarted):
        jobs = f"  {event.job_ids[0]}" if len(event.job_ids) == 1 else ""
        return line(f"{event.worker}  {event.name}{jobs}", "dim")
    if isinstance(event, JobSettled):
        return _settled_line(event)
    if isinstance(event, WorkerBenched):
        return line(f"{event.worker}  gets no jobs for now: {shorten(event.reason)}", "yellow")
    if isinstance(event, PlacePaused):
        return line(f"{event.place}  paused: {event.failure_class}: {event.reason}", "yellow")
    if isinstance(event, PlaceResumed):
        return line(f"{event.place}  works again", "green")
    return line(f"{event.worker}  lost with {len(event.job_ids)} job(s), replaced: {shorten(event.reason)}", "yellow")


def _settled_line(event: JobSettled) -> Text:
    if event.state is JobState.PUBLISHED:
        note = "" if event.created else "  (was there already)"
        first = line(f"{event.job_id}  published: {event.location}{note}", "green")
        return Text("\n").join([first, *(note_line(event.job_id, each) for each in event.notes)])
    failure = f"{event.failure_class}: {event.message}"
    match event.state:
        case JobState.AWAITING_APPROVAL:
            text = f"waits for approval  report: {event.report_path}"
        case JobState.RETRY_WAIT:
            text = f"again in {duration(event.retry_seconds or 0)}: {failure}"
        case JobState.QUEUED if event.place is not None:
            text = f"waits for {event.place}, not charged"
        case JobState.QUEUED if event.failure_class is not None:
            text = f"not charged, runs alone next: {event.message}"
        case JobState.QUEUED:
            text = "given back"
        case JobState.CANCELLED:
            text = "cancelled"
        case _:
            report = f"  report: {event.report_path}" if event.report_path else ""
            return line(f"{event.job_id}  {event.state}: {failure}{report}", "red")
    return line(f"{event.job_id}  {text}", "yellow")


def manifest_line(place: object, manifest: Manifest) -> Text:
    """Return a release in one line: where it is, its size, and its parity figures."""
    parity = manifest.parity
    figures = [f"{parity.num_changed_tensors} of {parity.num_tensors} tensors changed"]
    figures.append(f"worst rounding {parity.rounding_excess:.2f} of its bound")
    if parity.min_survival is not None:
        figures.append(f"at least {parity.min_survival:.0%} of the delta left")
    if manifest.kept is not None:
        figures.append(manifest.kept.words)
    if parity.mean_kl is not None:
        figures.append(f"KL {parity.mean_kl:.2g}")
    if parity.top1_agreement is not None:
        figures.append(f"top-1 {parity.top1_agreement:.3f}")
    size = f"{len(manifest.files)} files, {decimal(manifest.num_bytes)}"
    return line(f"{place}  {size}  parity ({parity.level}): {', '.join(figures)}", "green")


def comparison_table(ways: Sequence[Way]) -> Table:
    """Return one row for each merge of a comparison and each reference: how near it is, and how well it does."""
    table = Table(box=None, pad_edge=False)
    for name in ("compared with", "merged into"):
        table.add_column(name, overflow="fold")
    for name in ("KL", "top-1", "held-out KL", "top-1", "NLL", "NLL by base + adapter"):
        table.add_column(name, justify="right")
    for way in ways:
        into = way.base_quantization.value if way.base_quantization.converts else "own weights"
        held_out = way.check.held_out
        table.add_row(
            cell(way.check.reference),
            cell(f"{into} (this release)" if way.published else into),
            f"{way.check.mean_kl:.2g}",
            f"{way.check.top1_agreement:.3f}",
            *(
                ("", "", "", "")
                if held_out is None
                else (
                    f"{held_out.mean_kl:.2g}",
                    f"{held_out.top1_agreement:.3f}",
                    f"{held_out.merged_nll:.4f}",
                    f"{held_out.reference_nll:.4f}",
                )
            ),
        )
    return table


def summary_line(summary: Summary, seconds: float) -> Text:
    """Return what a driver did, and how long it took, in one line."""
    parts = [Text(f"{summary.published} published", "green")]
    if summary.unchanged:
        parts.append(Text(f"{summary.unchanged} published before", "green"))
    if summary.left:
        parts.append(Text(f"{summary.left} left", "yellow"))
    if summary.cancelled:
        parts.append(Text(f"{summary.cancelled} cancelled", "yellow"))
    parts += [Text(f"{count} failed: {failure}", "red") for failure, count in summary.failures.items()]
    return Text("  ").join([*parts, Text(f"in {duration(seconds)}")])
