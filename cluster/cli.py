"""The command line. It parses, calls and shows; what it calls is imported when it is called.

Exit codes: 0 done, 1 some job failed, 2 bad input, 3 parity failed.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster import exit_codes
from cluster.console.arguments import AsJson, Debug, Ids, Labels, LogFormat, Release, RequestFile, State, Version
from cluster.console.terminal import terminal
from jobs.errors import BadInputError
from jobs.locations import Location, parse_location
from jobs.request import BaseQuantization, Dtype
from jobs.states import JobState
from workers.files.collector import paused_collections

if TYPE_CHECKING:
    from jobs.ledger.records import JobRecord
    from jobs.ledger.store import JobStore

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Merge PEFT adapters into plain checkpoints in bulk: proven, then delivered.",
    epilog="Exit codes: 0 done, 1 some job failed, 2 bad input, 3 parity failed.",
)


@app.callback()
def _every_command(*, _version: Version = False) -> None:
    pass


@app.command()
def plan(file: RequestFile, *, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what each request of FILE would do, from headers alone: coverage, bytes, memory, time."""
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.console.display import note_line, preview_table
        from cluster.console.documents import preview_document
        from cluster.settings import load_settings
        from jobs.request_files.reading import load_requests

        settings = load_settings()
        requests = load_requests(file, settings.allowance)
        with paused_collections():  # it takes seconds to load, and a wrong file is told before
            from cluster.commands.plan import preview

        previews = preview(
            requests,
            settings.cache,
            settings.num_threads,
            settings.device,
            inert_fields=settings.inert_adapter_fields,
        )
        output.document({"requests": [preview_document(each) for each in previews]})
        output.show(preview_table(previews))
        for each in previews:
            for note in each.notes:
                output.show(note_line(each.request.id, note))
        failures = {each.request.id: each.failure for each in previews if each.failure is not None}
        for id_, failure in failures.items():
            output.show_error(f"{id_}: {failure.failure_class}: {failure.message}")
        raise typer.Exit(exit_codes.of_command(failure.failure_class for failure in failures.values()))


@app.command()
def submit(file: RequestFile, *, as_json: AsJson = False, debug: Debug = False) -> None:
    """Queue every request of FILE, or none when one is wrong. The same file twice changes nothing."""
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.settings import load_settings
        from jobs.request_files.reading import load_requests

        requests = load_requests(file, load_settings().allowance)
        with _open_store() as store:
            result = store.submit(requests)
        output.document({"created": list(result.created), "unchanged": list(result.unchanged)})
        output.show(f"{len(result.created)} jobs queued, {len(result.unchanged)} were there already")


@app.command()
def run(
    *,
    drain: Annotated[bool, typer.Option("--drain", help="End when the queue is empty.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes.")] = None,
    address: Annotated[str | None, typer.Option(help="Join the Ray cluster at host:port.")] = None,
    log_format: LogFormat = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Drive the queue: claim jobs, merge, verify, publish. Ctrl-C stops in order, a second one at once."""
    with terminal(as_json=as_json, debug=debug, log_format=log_format) as output:
        from cluster.commands.run import drive

        failures = drive(output, drain=drain, num_workers=workers, address=address, log_format=log_format or "text")
        raise typer.Exit(exit_codes.of_jobs(failures))


@app.command()
def status(
    ids: Ids = None, *, state: State = None, label: Labels = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Show jobs: state, stage, how far, and what came of them; of jobs named by ID, all their events."""
    with terminal(as_json=as_json, debug=debug) as output, _open_store() as store:
        from cluster.console.display import event_table, job_table, state_counts
        from cluster.console.documents import event_document, job_document

        counts = store.counts()
        records = _select(store, ids, state, label)
        documents = [job_document(record) for record in records]
        events = [store.events(record.id) for record in records] if ids else []
        for document, each in zip(documents, events, strict=False):
            document["events"] = [event_document(event) for event in each]
        output.document({"counts": {state.value: count for state, count in counts.items()}, "jobs": documents})
        if records:
            output.show(job_table(records))
        if events:
            output.show(event_table([event for each in events for event in each]))
        output.show(state_counts(counts))


@app.command()
def watch(*, as_json: AsJson = False, debug: Debug = False) -> None:
    """Follow the batch: a bar for each base, stages, time left. Ctrl-C detaches; the batch goes on."""
    with terminal(as_json=as_json, debug=debug) as output, _open_store() as store:
        from cluster.commands.watch import watch_batch
        from cluster.settings import load_settings

        try:
            failures = watch_batch(output, store, load_settings().poll_seconds)
        except KeyboardInterrupt:
            raise typer.Exit(exit_codes.DONE) from None
        raise typer.Exit(exit_codes.of_jobs(failures))


@app.command()
def retry(
    ids: Ids = None, *, state: State = None, label: Labels = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Queue jobs again that failed, were cancelled or quarantined, or wait for their time; attempts start anew."""
    with terminal(as_json=as_json, debug=debug) as output, _open_store() as store:
        changed = store.retry(_chosen(store, ids, state, label))
        output.document({"retried": list(changed)})
        output.show(f"{len(changed)} jobs queued again")


@app.command()
def cancel(
    ids: Ids = None, *, state: State = None, label: Labels = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Cancel jobs: those that wait at once, those at work as soon as their worker sees it."""
    with terminal(as_json=as_json, debug=debug) as output, _open_store() as store:
        changed = store.cancel(_chosen(store, ids, state, label))
        output.document({"cancelled": list(changed)})
        output.show(f"{len(changed)} jobs cancelled, or being stopped")


@app.command()
def merge(
    *,
    base: Annotated[str, typer.Option(metavar="LOC", help="Checkpoint to merge into.")],
    adapter: Annotated[list[str], typer.Option(metavar="LOC", help="Adapter; may be given several times.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="LOC", help="Destination; with several adapters, LOC/<adapter name>, on the Hub LOC-<adapter name>."
        ),
    ],
    base_quantization: Annotated[
        BaseQuantization, typer.Option(help="What the delta is added to.")
    ] = BaseQuantization.NF4,
    dtype: Annotated[Dtype | None, typer.Option(help="Output dtype; the base's own by default.")] = None,
    parity: Annotated[Literal["full", "arithmetic"], typer.Option(help="How the merge is proven.")] = "full",
    compare: Annotated[
        bool, typer.Option("--compare", help="Merge into the other base (16-bit, 4-bit) too, and show how both do.")
    ] = False,
    accept_unstable: Annotated[
        bool, typer.Option("--accept-unstable", help="Merge a method whose weights depend on this machine.")
    ] = False,
    log_format: LogFormat = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge here and now, in one pass: no queue, no Ray."""
    with terminal(as_json=as_json, debug=debug, log_format=log_format) as output:
        from cluster.commands.merge import build_requests, merge_and_show

        requests = build_requests(
            base=base,
            adapters=adapter,
            destination=to,
            base_quantization=base_quantization,
            dtype=dtype,
            parity=parity,
            compare=compare,
            accept_unstable=accept_unstable,
        )
        raise typer.Exit(exit_codes.of_command(merge_and_show(output, requests)))


@app.command()
def verify(location: Release, *, as_json: AsJson = False, debug: Debug = False) -> None:
    """Check a release where it is: every file against its manifest. No GPU, no model."""
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.console.display import manifest_line
        from cluster.console.documents import manifest_document
        from cluster.settings import load_settings
        from workers.releases.delivery import verify_release

        place = _parse(location)
        manifest = verify_release(place, load_settings().scratch)
        output.document({"location": str(place), **manifest_document(manifest)})
        output.show(manifest_line(place, manifest))


@app.command()
def pull(
    location: Release,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Missing or empty directory.")],
    *,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring a release to a directory, verified on the way; the directory appears whole or not at all."""
    with terminal(as_json=as_json, debug=debug) as output:
        from cluster.console.display import manifest_line
        from cluster.console.documents import manifest_document
        from workers.releases.delivery import pull_release

        manifest = pull_release(_parse(location), directory)
        output.document({"location": str(directory.absolute()), **manifest_document(manifest)})
        output.show(manifest_line(directory, manifest))


def main() -> None:
    """Run the command line."""
    app()


@contextlib.contextmanager
def _open_store() -> Iterator["JobStore"]:
    from cluster.settings import load_settings
    from jobs.ledger.store import JobStore

    with contextlib.closing(JobStore(load_settings().store)) as store:
        yield store


def _parse(location: str) -> Location:
    try:
        return parse_location(location)
    except ValueError as error:
        raise BadInputError(str(error)) from error


def _select(
    store: "JobStore", ids: list[str] | None, state: JobState | None, labels: list[str] | None
) -> "tuple[JobRecord, ...]":
    """Return the jobs a person asked for; everything when nothing narrows it.

    Raises:
        BadInputError: a label is no K=V, or an id is no job.
    """
    given = (*(ids or ()), *(labels or ()))
    if broken := [text for text in given if any("\ud800" <= letter <= "\udfff" for letter in text)]:
        raise BadInputError(f"expected ids and labels in UTF-8, found {broken[0]!r}")
    pairs = [label.partition("=") for label in labels or ()]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise BadInputError(f"--label: expected K=V, found {wrong[0]!r}")
    if ids and (unknown := set(ids) - {record.id for record in store.jobs(ids=ids)}):
        raise BadInputError(f"no such job: {', '.join(sorted(unknown))}")
    return store.jobs(
        ids=ids or None,
        states=None if state is None else [state],
        labels={name: value for name, _, value in pairs} or None,
    )


def _chosen(
    store: "JobStore", ids: list[str] | None, state: JobState | None, labels: list[str] | None
) -> tuple[str, ...]:
    """Return the ids of the jobs a person chose to change.

    Raises:
        BadInputError: nothing was chosen; all jobs are never meant by saying nothing.
    """
    if not (ids or state or labels):
        raise BadInputError("name the jobs: ids, --state or --label")
    return tuple(record.id for record in _select(store, ids, state, labels))
