"""Commands about what happened: the log lines of a job, the picture of a batch."""

from pathlib import Path
from typing import Annotated

import typer

from cluster import exit_codes
from cluster.cli.opening import open_store, select
from cluster.console.arguments import AsJson, Debug
from cluster.console.terminal import terminal
from jobs.errors import BadInputError

commands = typer.Typer()


@commands.command()
def logs(
    job: Annotated[str, typer.Argument(metavar="ID", help="The job.")],
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job is final.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what driver and workers logged about one job, in order of time, from the log files this machine sees."""
    with terminal(as_json=as_json, debug=debug) as output, open_store() as store:
        from cluster.commands.logs import show_logs
        from cluster.settings import load_settings

        settings = load_settings()
        if not store.ids(select(store, ids=[job])):
            raise BadInputError(f"no such job: {job}")
        try:
            show_logs(output, store, settings.logs, job, follow_seconds=settings.poll_seconds if follow else None)
        except KeyboardInterrupt:
            raise typer.Exit(exit_codes.DONE) from None


@commands.command()
def report(
    batch: Annotated[str, typer.Argument(metavar="BATCH", help="Of which all jobs are shown.")],
    *,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; by default BATCH.html in the working directory.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a batch: who was at what when, what failed why, parity, speed."""
    with terminal(as_json=as_json, debug=debug) as output, open_store() as store:
        from cluster.commands.report import write_report
        from cluster.settings import load_settings

        page = Path(f"{batch}.html") if to is None else to
        path, num_jobs = write_report(store, select(store, batch=batch), batch, page, load_settings().reports)
        output.document({"report": str(path), "batch": batch, "num_jobs": num_jobs})
        output.show(f"{num_jobs} jobs of {batch}: {path}")
