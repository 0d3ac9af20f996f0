"""Lines of logs for a person."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from cluster.console.display import line

_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
_SHOWN_APART = frozenset({"at", "level", "logger", "message", "traceback", "file", "job_id", "job_ids", "unit"})


def log_line(document: Mapping[str, Any]) -> Text:
    """Return one line of a log file: when, who, how serious, what, and what there is beside it."""
    at = f"{datetime.fromtimestamp(document['at'], UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3]
    writer = str(document.get("file", "")).partition("@")[0]
    level = str(document.get("level", ""))
    beside = " ".join(f"{name}={value}" for name, value in document.items() if name not in _SHOWN_APART)
    words = f"{at}  {writer}  {level}  {document.get('message', '')}"
    text = f"{words}  {beside}" if beside else words
    return line(f"{text}\n{document['traceback']}" if "traceback" in document else text, _STYLES.get(level, ""))


def missing_line(node: str | None, name: str, *, is_here: bool) -> Text:
    """Return that a log file is not to be seen, and where it would be."""
    if is_here:
        return line(f"missing: {name} is not on this machine any more: it was removed, or the disk was full", "yellow")
    return line(f"missing: {name} is on {node}: run this command there, or share the directory of logs", "yellow")
