"""Logging, configured once by the command line. Workers get the same formats from Ray (see `ray_fleet/session.py`).

What is kept of it in files is written by `log_files.py`.
"""

import json
import logging
import sys
from typing import Any, Literal

from jobs.text import MAX_MESSAGE, shown

LogFormat = Literal["text", "json"]

DEBUG_VARIABLE = "MERGEFLEET_DEBUG"
"""Environment variable; set to anything but 0, errors come with their traceback."""

_MAX_TRACEBACK = 100_000

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(document_of(record), default=str)


class TextFormatter(logging.Formatter):
    """One line for a person, with what was given as `extra` after the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        """Return the line, traceback apart."""
        extra = " ".join(f"{name}={value}" for name, value in _extra(record).items())
        return shown(" ".join(filter(None, (super().formatMessage(record), extra))), MAX_MESSAGE, lines=True)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the name is logging's
        """Return a traceback, whose last line may hold text from outside."""
        return shown(super().formatException(ei), _MAX_TRACEBACK, lines=True)


def document_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return a record as a JSON object."""
    document: dict[str, Any] = {
        "at": record.created,
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage(),
    }
    document |= _extra(record)
    if record.exc_info:
        document["traceback"] = logging.Formatter().formatException(record.exc_info)
    return document


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """Return what was given as `extra`; names with an underscore are notes that Ray makes for itself."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and name[0] != "_"}


def configure_logging(log_format: LogFormat | None) -> None:
    """Send log records to stderr.

    Args:
        log_format: `text` or `json`, from INFO on; None writes only warnings and errors, as text.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING if log_format is None else logging.INFO, force=True)
    quiet_libraries()


def quiet_libraries() -> None:
    """Keep libraries from logging what belongs in no log of ours."""
    # On import it recommends a package that would fetch kernels from a Hub at run time.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # With INFO it logs the URL of every request, and the Hub redirects to signed ones.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
