"""Commands about jobs in the queue: submit, look, follow, cancel, try again."""

import getpass
from typing import Annotated

import typer

from cluster import exit_codes
from cluster.cli.opening import choose, open_service, select
from cluster.console.arguments import (
    AsJson,
    Batch,
    By,
    Debug,
    FailureClasses,
    Ids,
    Labels,
    Limit,
    RequestFile,
    Since,
    Sort,
    States,
)
from cluster.console.terminal import terminal

commands = typer.Typer()


@commands.command()
def submit(
    file: RequestFile,
    *,
    batch: Annotated[
        str | None, typer.Option(help="Name of the batch; by default that of FILE. New jobs join one that exists.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Queue every request of FILE as a batch, or none when one is wrong. The same file twice changes nothing."""
    with terminal(as_json=as_json, debug=debug) as output:
        from jobs.batch import batch_name

        name = batch_name(file.stem if batch is None else batch, given=batch is not None)
        with open_service() as service:
            result = service.submit_file(file, name)
        output.document(
            {
                "batch": result.batch,
                "created": list(result.created),
                "unchanged": list(result.unchanged),
                "left_out": list(result.left_out),
            }
        )
        for each in result.left_out:
            output.show(f"left out: {each}")
        there = f", {len(result.unchanged)} were there already" if result.unchanged else ""
        output.show(f"batch {result.batch}: {len(result.created)} jobs queued{there}")


@commands.command()
def status(
    ids: Ids = None,
    *,
    batch: Batch = None,
    state: States = None,
    label: Labels = None,
    since: Since = None,
    limit: Limit = 50,
    sort: Sort = "submitted",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show batches, jobs, what is paused and the drivers; of jobs named by ID, all that happened to them."""
    with terminal(as_json=as_json, debug=debug) as output, open_service() as service:
        from cluster.commands.status import show_jobs, show_overview

        changed_since = None if since is None else service.now() - since
        selection = select(service, ids=ids, batch=batch, states=state, labels=label, since=changed_since)
        if ids or batch or state or label or since is not None:
            show_jobs(output, service, selection, limit=limit, order=sort, with_events=bool(ids))
        else:
            show_overview(output, service, limit=limit, order=sort)


@commands.command()
def watch(*, batch: Batch = None, label: Labels = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Follow jobs: a bar for each base, stages, time left. Ctrl-C detaches; the jobs go on.

    Of a batch all jobs count; without one those that are not final yet. The exit code is theirs.
    """
    with terminal(as_json=as_json, debug=debug) as output, open_service() as service:
        import dataclasses

        from cluster.commands.watch import watch_jobs
        from cluster.settings import load_settings

        selection = select(service, batch=batch, labels=label)
        if batch is None:
            selection = dataclasses.replace(selection, unfinished_at=service.now())
        try:
            failures = watch_jobs(output, service, selection, load_settings().poll_seconds)
        except KeyboardInterrupt:
            raise typer.Exit(exit_codes.DONE) from None
        raise typer.Exit(exit_codes.of_jobs(failures))


@commands.command()
def retry(
    ids: Ids = None,
    *,
    batch: Batch = None,
    state: States = None,
    label: Labels = None,
    failed: Annotated[bool, typer.Option("--failed", help="Jobs that failed for good, or are quarantined.")] = False,
    failure_class: FailureClasses = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Queue jobs again that failed, were cancelled or quarantined, or wait for their time; attempts start anew."""
    with terminal(as_json=as_json, debug=debug) as output, open_service() as service:
        from jobs.states import UNSUCCESSFUL_STATES

        states = [*(state or ()), *(UNSUCCESSFUL_STATES if failed else ())]
        changed = service.retry(
            choose(service, ids=ids, batch=batch, states=states, labels=label, failures=failure_class)
        )
        output.document({"retried": list(changed)})
        output.show(f"{len(changed)} jobs queued again")


@commands.command()
def cancel(
    ids: Ids = None,
    *,
    batch: Batch = None,
    state: States = None,
    label: Labels = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Cancel jobs: those that wait at once, those at work within seconds. What is being published may still appear."""
    with terminal(as_json=as_json, debug=debug) as output, open_service() as service:
        changed = service.cancel(choose(service, ids=ids, batch=batch, states=state, labels=label))
        output.document({"cancelled": list(changed)})
        output.show(f"{len(changed)} jobs cancelled, or being stopped")


@commands.command()
def approve(
    ids: Ids = None,
    *,
    batch: Batch = None,
    label: Labels = None,
    by: By = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let jobs that wait for approval be published: what was merged and proven, under the name of who says so."""
    with terminal(as_json=as_json, debug=debug) as output, open_service() as service:
        changed = service.approve(choose(service, ids=ids, batch=batch, labels=label), by or getpass.getuser())
        output.document({"approved": list(changed)})
        output.show(f"{len(changed)} jobs approved")


@commands.command()
def reject(
    ids: Ids = None,
    *,
    batch: Batch = None,
    label: Labels = None,
    by: By = None,
    reason: Annotated[str, typer.Option(help="In the events of the job.")] = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Cancel jobs that wait for approval."""
    with terminal(as_json=as_json, debug=debug) as output, open_service() as service:
        chosen = choose(service, ids=ids, batch=batch, labels=label)
        changed = service.reject(chosen, by or getpass.getuser(), reason)
        output.document({"rejected": list(changed)})
        output.show(f"{len(changed)} jobs rejected")
