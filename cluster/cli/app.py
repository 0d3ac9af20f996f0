"""All commands in one program."""

import typer

from cluster.cli import merging, queue, running, seeing, serving, steering
from cluster.console.arguments import Version

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Merge PEFT adapters into plain checkpoints in bulk: proven, then delivered.",
    epilog="Exit codes: 0 done, 1 some job failed, 2 bad input, 3 parity failed, 4 work is left.",
)


@app.callback()
def _every_command(*, _version: Version = False) -> None:
    pass


for each in (merging, queue, running, seeing, serving, steering):
    app.add_typer(each.commands)


def main() -> None:
    """Run the command line."""
    app()
