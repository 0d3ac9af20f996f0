"""Where the command line writes: text for a person, or JSON on stdout and nothing else there."""

import contextlib
import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from cluster import exit_codes
from cluster.logs import DEBUG_VARIABLE, LogFormat, configure_logging
from jobs.errors import InternalError, MergefleetError
from jobs.text import MAX_MESSAGE, shown

_MAX_ERRORS = 1_000_000
"""Characters of an error: a request file may have thousands of mistakes, each on a line of its own."""


class _Console(Console):
    """A console that raises what writing raises; where the reader of a pipe is gone, Rich ends the process instead."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Terminal:
    """The output of one command."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = sys.stdout
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal may know fewer characters than a name has
                stream.reconfigure(errors="backslashreplace")
        # What is shown may hold text from outside: it is data, never markup, and `:name:` is no picture.
        self.out = _Console(file=self._stdout, highlight=False, markup=False, emoji=False)
        self._errors = _Console(stderr=True, highlight=False, markup=False, emoji=False)

    def show(self, view: RenderableType) -> None:
        """Show something to a person; says nothing with `--json`."""
        if not self.as_json:
            text = shown(view, MAX_MESSAGE, lines=True) if isinstance(view, str) else view
            self.out.print(text, soft_wrap=isinstance(view, str | Text))

    def show_error(self, message: str) -> None:
        """Show on stderr what went wrong; says nothing with `--json`."""
        if not self.as_json:
            self._errors.print(shown(message, _MAX_ERRORS, lines=True), style="red", soft_wrap=True)

    def document(self, value: dict[str, Any]) -> None:
        """Write one JSON document on one line; says nothing without `--json`."""
        if self.as_json:
            self._stdout.write(json.dumps(value) + "\n")
            self._stdout.flush()

    def leave(self) -> None:
        """Send all further output to nowhere, what could not be written included: its reader is gone."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def terminal(*, as_json: bool, debug: bool, log_format: LogFormat | None = None) -> Iterator[Terminal]:
    """Open the output of a command, and turn what goes wrong into one clear message and an exit code.

    Meanwhile stdout is the command's own: what libraries write there goes to stderr.

    Args:
        as_json: whether stdout gets JSON, errors included.
        debug: whether errors come with their traceback.
        log_format: of log records from INFO on; None for warnings and errors only, as text.

    Raises:
        typer.Exit: with the code for the error.
    """
    output = Terminal(as_json=as_json)
    debug = debug or os.environ.get(DEBUG_VARIABLE, "0") != "0"
    try:
        configure_logging(log_format)
        with contextlib.redirect_stdout(sys.stderr):
            yield output
    except (typer.Exit, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        raise typer.Exit(exit_codes.INTERRUPTED) from None
    except MergefleetError as error:
        _report(output, error, debug=debug)
        raise typer.Exit(exit_codes.of_command([error.failure_class])) from error
    except Exception as error:
        where = _keep_traceback(error)
        fault = InternalError(
            f"{type(error).__name__}: {error}; this is a fault of mergefleet, its traceback is in {where}"
        )
        _report(output, fault, debug=debug)
        raise typer.Exit(exit_codes.FAILED) from error


def _report(output: Terminal, error: MergefleetError, *, debug: bool) -> None:
    from cluster.console.documents import error_document  # noqa: PLC0415 - with the store's libraries, and --help needs none

    if debug:
        traceback.print_exc(file=sys.stderr)
    output.document(error_document(error))
    output.show_error(f"error: {error}")


def _keep_traceback(error: Exception) -> str:
    """Append the traceback of a fault to a file, and return where that is."""
    from cluster.settings import load_settings  # noqa: PLC0415

    try:
        path = load_settings().home / "faults.log"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)  # arguments and messages are for those who run the fleet
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now(UTC).isoformat()} {' '.join(sys.argv)}\n")
            traceback.print_exception(error, file=file)
    except (MergefleetError, OSError):
        traceback.print_exception(error, file=sys.stderr)
        return "the lines above"
    return str(path)
