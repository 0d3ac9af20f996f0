"""The command that drives the queue."""

from collections.abc import Callable
from typing import Annotated

import typer

from cluster.console.arguments import AsJson, Debug, LogFormat
from cluster.console.terminal import terminal

commands = typer.Typer()


@commands.command()
def run(
    *,
    drain: Annotated[bool, typer.Option("--drain", help="End when the queue is empty.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Join the Ray cluster at host:port; auto: the one that RAY_ADDRESS names.")
    ] = None,
    log_format: LogFormat = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Drive the queue: claim jobs, merge, verify, publish. Ctrl-C stops in order, a second one at once."""

    def drive_here(predecessor: str | None, tell_name: Callable[[str], None]) -> int:
        try:
            with terminal(as_json=as_json, debug=debug, log_format=log_format) as output:
                from cluster.commands.run import drive

                return drive(
                    output,
                    drain=drain,
                    num_workers=workers,
                    address=address,
                    log_format=log_format or "text",
                    predecessor=predecessor,
                    tell_name=tell_name,
                )
        except typer.Exit as ended:
            return ended.exit_code

    from cluster.commands.supervision import Supervisor
    from cluster.logs import configure_logging

    configure_logging(log_format)
    raise typer.Exit(Supervisor(drive_here).run())
