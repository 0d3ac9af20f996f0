"""Log files: one for each driver and each worker of it, JSON lines, bounded in size, for their owner's eyes alone."""

import contextlib
import json
import logging
import logging.handlers
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from cluster.logs import document_of

MAX_FILE_BYTES = 8 << 20
NUM_OLD_FILES = 3
"""Of one driver or worker, beside the one that is written: 32 MiB in all."""
MAX_TOTAL_BYTES = 1 << 30
"""Of a directory, as far as files can go that were not written to for a day."""
_IDLE_SECONDS = 86_400.0

_OURS = frozenset({"jobs", "workers", "cluster"})
_SUFFIX = ".jsonl"
_SECRETS = (
    # In the text of a JSON line: a URL ends where a blank, a quote or an escape begins.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s\"\\@]+@"), r"\1…@"),
    (re.compile(r"(\bhttps?://[^\s\"\\?]+\?)[^\s\"\\]+"), r"\1…"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=\bBearer )[^\s\"\\]+|\bAKIA[A-Z0-9]{12,}"), "…"),
)
"""User names and passwords in URLs, what follows their question mark (signatures of stores are there), tokens."""


def driver_log(owner: str) -> str:
    """Return the name of the log file of a driver."""
    return f"driver@{owner}{_SUFFIX}"


def worker_log(worker: str, host: str, owner: str) -> str:
    """Return the name of the log file of a worker: the place in the fleet, its machine, and the driver it works for."""
    return f"{worker}@{host}@{owner}{_SUFFIX}".replace("/", "_")


def owner_of(path: Path) -> str | None:
    """Return the driver that a log file, or an older part of one, is from; None for another file."""
    stem, suffix, part = path.name.rpartition(_SUFFIX)
    is_log = bool(suffix) and "@" in stem and (not part or part.removeprefix(".").isdecimal())
    return stem.rpartition("@")[2] if is_log else None


def writer_of(path: Path) -> str:
    """Return what wrote a log file: `driver`, or the worker."""
    return path.name.partition("@")[0]


def log_files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the log files of a directory, older parts included; none where there is no directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            if owner_of(Path(entry.name)) is not None:
                with contextlib.suppress(FileNotFoundError):  # it may have been renamed since
                    yield Path(entry.path), entry.stat(follow_symlinks=False)


class LogFile(logging.handlers.RotatingFileHandler):
    """Writes our own records from INFO on, and those of others from WARNING on, to a file of this process.

    In a fork of the process it writes nothing: its descriptor may be another file there. A file that cannot be written
    to stops no work; it is told once on stderr.
    """

    def __init__(self, path: Path, beside: Callable[[], dict[str, Any]]) -> None:
        """Take where to write; the file is made with the first record.

        Args:
            path: of the file; its directory is made with mode 0700, it with 0600.
            beside: returns what every line says that does not say it itself.
        """
        super().__init__(path, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8", delay=True)
        self.beside = beside
        self._pid = os.getpid()
        self._told = False
        self.addFilter(_is_told)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if os.getpid() == self._pid:
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON without secrets."""
        line = json.dumps(self.beside() | document_of(record), default=str)
        for pattern, instead in _SECRETS:
            line = pattern.sub(instead, line)
        return line

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - the name is logging's
        """Say once that the file cannot be written to."""
        if not self._told:
            self._told = True
            with contextlib.suppress(OSError):
                sys.stderr.write(f"mergefleet: log file {self.baseFilename}: {sys.exception()}; lines are lost\n")

    def _open(self) -> TextIOWrapper:
        path = Path(self.baseFilename)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def _is_told(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in _OURS


def start_log(directory: Path, name: str, beside: Callable[[], dict[str, Any]] = dict) -> LogFile:
    """Have this process write a log file, from now on; what else it logs to stays as it is.

    Args:
        directory: where it lies; what was written there long ago makes room.
        name: of the file.
        beside: returns what every line says that does not say it itself.
    """
    make_room(directory, time.time())
    root = logging.getLogger()
    for handler in root.handlers:
        handler.setLevel(max(handler.level, root.level))
    root.setLevel(min(root.level, logging.INFO))
    file = LogFile(directory / name, beside)
    # Before others: Ray's handlers write its own names into the records that they get, `job_id` among them.
    root.handlers.insert(0, file)
    return file


@contextlib.contextmanager
def written_log(directory: Path, name: str) -> Iterator[None]:
    """Have this process write a log file, as long as this lasts."""
    file = start_log(directory, name)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(file)
        file.close()


def make_room(directory: Path, now: float) -> None:
    """Remove what is oldest of a directory of logs, of what no process seems to write to, while it holds too much."""
    found = sorted(log_files(directory), key=lambda each: each[1].st_mtime)
    too_much = sum(state.st_size for _, state in found) - MAX_TOTAL_BYTES
    for path, state in found:
        if too_much <= 0 or now - state.st_mtime < _IDLE_SECONDS:
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        too_much -= state.st_size
