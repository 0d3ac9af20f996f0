"""The `merge` command: one pass here and now, through a worker in this process; no queue, no Ray."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.console.display import comparison_table, manifest_line, note_line
from cluster.console.documents import adapter_document, failure_document, plain, release_document
from cluster.console.terminal import Terminal
from cluster.settings import load_settings, worker_settings
from jobs.errors import BadInputError, FailureClass
from jobs.kept import Keep
from jobs.locations import Location, parse_location
from jobs.output_form import OutputForm
from jobs.parity_policy import ParityPolicy
from jobs.parity_report import ParityReport, Way
from jobs.release import REPORT_NAME, Release
from jobs.request import BaseQuantization, Dtype, MergeRequest
from jobs.request_files.problems import expectation, mistakes
from workers.files.collector import loading
from workers.merging.outcomes import Failure, JobOutcome, Usage
from workers.merging.outcomes import Progress as UnitProgress

if TYPE_CHECKING:
    from workers.worker import MergeWorker

_POLL_SECONDS = 0.2
_COLUMNS = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.fields[stages]}", markup=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What became of one request: a release or a failure."""

    request: MergeRequest
    release: Release | None
    failure: Failure | None
    report_path: Path | None

    @property
    def ways(self) -> tuple[Way, ...]:
        """The comparison its report holds, if one was asked for."""
        if self.report_path is None or not self.request.compare:
            return ()
        return ParityReport.model_validate_json((self.report_path / REPORT_NAME).read_bytes()).ways


def build_requests(
    *,
    base: str,
    adapters: Sequence[str],
    destination: str,
    base_quantization: BaseQuantization,
    dtype: Dtype | None,
    output: OutputForm,
    keep: Keep | None,
    parity: Literal["full", "arithmetic"],
    compare: bool,
    accept_unstable: bool,
) -> tuple[MergeRequest, ...]:
    """Return a request for each adapter; several go to `<destination>/<adapter name>`, on the Hub with a dash.

    Raises:
        BadInputError: a location is none (of a Hub repository, a name that it cannot have), two adapters have the same
            name, or a request is invalid.
    """
    places = [_parse("--adapter", adapter) for adapter in adapters]
    target = _parse("--to", destination)
    names = [place.name for place in places]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInputError(
            f"--adapter: several adapters are called {', '.join(twice)}, and each would go to "
            f"{target.child('<name>')}; merge them one by one"
        )
    try:
        return tuple(
            MergeRequest(
                base=_parse("--base", base),
                adapter=place,
                destination=target if len(places) == 1 else _parse("--to", str(target.child(place.name))),
                base_quantization=base_quantization,
                dtype=dtype,
                output=output,
                keep=keep,
                parity=ParityPolicy(level=parity),
                compare=compare,
                accept_unstable=accept_unstable,
            )
            for place in places
        )
    except ValidationError as error:
        problems = [expectation(detail) for detail in mistakes(error)]
        raise BadInputError("; ".join(f"expected {expected}, found {found}" for expected, found in problems)) from error


def _parse(option: str, text: str) -> Location:
    try:
        return parse_location(text)
    except ValueError as error:
        raise BadInputError(f"{option}: {error}") from error


def merge_and_show(output: Terminal, requests: tuple[MergeRequest, ...]) -> tuple[FailureClass, ...]:
    """Merge, with a progress bar for a person, and show each release or failure.

    Returns:
        The classes of the failures.
    """
    settings = load_settings()
    with loading():  # it takes seconds to load, and wrong arguments are told before
        from workers.unit.leftovers import keep_clear  # noqa: PLC0415
        from workers.worker import MergeWorker  # noqa: PLC0415
    # Before there is another thread: what tries files out is then a fork of this process.
    of_worker = worker_settings(settings, device=settings.device, num_threads=settings.num_threads)
    worker = MergeWorker(of_worker)
    keep_clear(of_worker.scratch)
    with Progress(*_COLUMNS, console=output.out, transient=True, disable=output.as_json) as bar:
        task = bar.add_task("merge", total=None, stages="")

        def on_progress(progress: UnitProgress) -> None:
            stages = "  ".join(f"{n} {stage}" for stage, n in sorted(Counter(progress.stages.values()).items()))
            bar.update(task, total=progress.bytes_total or None, completed=progress.bytes_done, stages=stages)

        results, usage = merge_now(worker, requests, on_progress)
    output.document({"merges": [_document(result) for result in results], "usage": plain(usage)})
    for result in results:
        if result.release is not None:
            output.show(manifest_line(result.release.location, result.release.manifest))
            for note in result.release.manifest.notes:
                output.show(note_line(result.release.location, note))
            if ways := result.ways:
                output.show(comparison_table(ways))
            elif result.request.compare:
                output.show("The release was there already: nothing was merged, and nothing compared.")
        elif result.failure is not None:
            output.show_error(f"{result.request.adapter}: {result.failure.failure_class}: {result.failure.message}")
    return tuple(result.failure.failure_class for result in results if result.failure is not None)


def _document(result: MergeResult) -> dict[str, Any]:
    return {
        "id": result.request.id,
        **adapter_document(result.request),
        "destination": str(result.request.destination),
        "release": None if result.release is None else release_document(result.release),
        "failure": failure_document(result.failure),
        "comparison": [way.model_dump(mode="json", exclude={"check": {"prompts"}}) for way in result.ways],
        "report_path": None if result.report_path is None else str(result.report_path),
    }


def merge_now(
    worker: "MergeWorker", requests: tuple[MergeRequest, ...], on_progress: Callable[[UnitProgress], None]
) -> tuple[tuple[MergeResult, ...], Usage]:
    """Merge, verify and publish; a request that fails fails alone.

    Args:
        worker: is closed in the end.
        requests: with equal pass keys.
        on_progress: called a few times a second, in this thread.

    Returns:
        What became of each request, in their order, and what the pass took.

    Raises:
        KeyboardInterrupt: as it came; what was staged is gone.
    """
    try:
        with ThreadPoolExecutor(max_workers=1) as executor:
            future = executor.submit(worker.run_unit, "merge", requests)
            try:
                while wait([future], timeout=_POLL_SECONDS).not_done:
                    on_progress(worker.progress())
            except KeyboardInterrupt:
                while wait([future], timeout=_POLL_SECONDS).not_done:
                    worker.cancel(frozenset(request.id for request in requests))
                raise
        unit = future.result()
        outcomes = {outcome.job_id: outcome for outcome in unit.jobs}
        return tuple(_publish(worker, request, outcomes[request.id]) for request in requests), unit.usage
    finally:
        worker.close()


def _publish(worker: "MergeWorker", request: MergeRequest, outcome: JobOutcome) -> MergeResult:
    release, failure = outcome.release, outcome.failure
    if release is None and failure is None:
        published = worker.publish(request.id)
        release, failure = published.release, published.failure
    return MergeResult(request=request, release=release, failure=failure, report_path=outcome.report_path)
