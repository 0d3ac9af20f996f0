"""Commands about what happened."""

from typing import Annotated

import typer

from cluster import exit_codes
from cluster.cli.opening import open_store, select
from cluster.console.arguments import AsJson, Debug
from cluster.console.terminal import terminal

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
        select(store, ids=[job])
        try:
            show_logs(output, store, settings.logs, job, follow_seconds=settings.poll_seconds if follow else None)
        except KeyboardInterrupt:
            raise typer.Exit(exit_codes.DONE) from None
