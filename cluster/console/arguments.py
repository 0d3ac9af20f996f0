"""Arguments and options that several commands take."""

import importlib.metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.durations import parse_duration
from jobs.errors import FailureClass, InvalidValueError
from jobs.states import JobState


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except InvalidValueError as error:
        raise typer.BadParameter(str(error)) from error


AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout; logs go to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
LogFormat = Annotated[
    Literal["text", "json"] | None, typer.Option(help="Write logs from INFO on; without it, warnings as text.")
]
RequestFile = Annotated[Path, typer.Argument(metavar="FILE", help="Requests: YAML, JSON lines or CSV.")]
Release = Annotated[str, typer.Argument(metavar="LOC", help="Where the release is.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Jobs by id.")]
States = Annotated[
    list[JobState] | None,
    typer.Option("--state", case_sensitive=False, help="Jobs in this state, or in one of several."),
]
By = Annotated[str | None, typer.Option(metavar="PERSON", help="Who decides; by default the user at this terminal.")]
Batch = Annotated[str | None, typer.Option(metavar="NAME", help="Jobs of this batch.")]
FailureClasses = Annotated[
    list[FailureClass] | None, typer.Option("--class", help="Jobs whose last failure is of this class.")
]
Since = Annotated[
    float | None, typer.Option(parser=_seconds, metavar="AGE", help="Jobs that changed within this time: 90s, 12h, 3d.")
]
Limit = Annotated[int, typer.Option(min=1, help="Jobs shown at most.")]
Sort = Annotated[Literal["submitted", "updated", "priority"], typer.Option(help="Order of the jobs shown.")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="K=V", help="Jobs with this label.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mergefleet {importlib.metadata.version('mergefleet')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]
