"""Lines of logs for a person."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from cluster.console.display import line

_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
_SHOWN_APART = frozenset({"at", "level", "logger", "message", "traceback", "file", "job_id", "job_ids"})
_OF_A_UNIT = frozenset({"unit started", "unit begun", "shards started"})
"""Messages that tell of a unit; in all others of a worker its name would only be said again."""


def log_line(document: Mapping[str, Any]) -> Text:
    """Return one line of a log file: when, who, how serious, what, and what there is beside it."""
    at = _time(document["at"])
    writer = str(document.get("file", "")).partition("@")[0]
    level = str(document.get("level", ""))
    apart = _SHOWN_APART if document.get("message") in _OF_A_UNIT else _SHOWN_APART | {"unit"}
    beside = " ".join(f"{name}={value}" for name, value in document.items() if name not in apart)
    words = f"{at}  {writer}  {level}  {document.get('message', '')}"
    text = f"{words}  {beside}" if beside else words
    return line(f"{text}\n{document['traceback']}" if "traceback" in document else text, _STYLES.get(level, ""))


def missing_line(node: str | None, name: str, *, is_here: bool) -> Text:
    """Return that a log file is not to be seen, and where it would be."""
    if is_here:
        return line(f"missing: {name} is not on this machine any more: it was removed, or the disk was full", "yellow")
    return line(f"missing: {name} is on {node}: run this command there, or share the directory of logs", "yellow")


def rotated_line(name: str, begins: float) -> Text:
    """Return that the lines about the begin of a job have made room for later ones."""
    return line(f"missing: {name} has nothing left from before {_time(begins)}", "yellow")


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3]
