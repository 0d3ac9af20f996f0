"""Arguments and options that several commands take."""

import importlib.metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.states import JobState

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout; logs go to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
LogFormat = Annotated[
    Literal["text", "json"] | None, typer.Option(help="Write logs from INFO on; without it, warnings as text.")
]
RequestFile = Annotated[Path, typer.Argument(metavar="FILE", help="Requests: YAML, JSON lines or CSV.")]
Release = Annotated[str, typer.Argument(metavar="LOC", help="Where the release is.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Jobs by id.")]
State = Annotated[JobState | None, typer.Option(case_sensitive=False, help="Jobs in this state.")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="K=V", help="Jobs with this label.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mergefleet {importlib.metadata.version('mergefleet')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]
