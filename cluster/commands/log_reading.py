"""The lines of log files about one job: found by its id, read on from where the last reading ended."""

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from cluster.log_files import log_files, owner_of

_MAX_LINE_BYTES = 4 << 20


class LogReader:
    """Reads what is new about a job in the log files of a directory; one that is renamed meanwhile is known again."""

    def __init__(self, directory: Path, job_id: str) -> None:
        """Take what to look for.

        Args:
            directory: of log files; it may be missing.
            job_id: of the job.
        """
        self._directory = directory
        self._job_id = job_id
        self._needle = json.dumps(job_id).encode()
        self._read_to: dict[tuple[int, int], int] = {}
        """By device and number of a file, how far it was read: a rotation changes names alone."""
        self.begins: dict[str, float] = {}
        """By name of a log, the time of its oldest line that is left."""

    def read(self, owners: Collection[str]) -> list[dict[str, Any]]:
        """Return new lines about the job as they were written, with the `file` of each, in the order of their time.

        Args:
            owners: the drivers whose files are looked at, with those of their workers.
        """
        found: list[dict[str, Any]] = []
        for path, state in log_files(self._directory):
            key = state.st_dev, state.st_ino
            if owner_of(path) in owners and state.st_size > self._read_to.get(key, 0):
                found += [line | {"file": path.name} for line in self._lines(path, key)]
        return sorted(found, key=lambda line: line["at"])

    def names(self) -> frozenset[str]:
        """Return the names of the files that this machine sees."""
        return frozenset(path.name for path, _ in log_files(self._directory))

    def _lines(self, path: Path, key: tuple[int, int]) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # removed or renamed meanwhile
            if key not in self._read_to:
                self._note_begin(path, file.readline())
            file.seek(self._read_to.get(key, 0))
            for line in file:
                if not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES:
                    break  # it is being written
                self._read_to[key] = self._read_to.get(key, 0) + len(line)
                if self._needle in line and (document := self._document(line)) is not None:
                    yield document

    def _note_begin(self, path: Path, line: bytes) -> None:
        document = _parsed(line)
        if document is not None:
            name = f"{path.name.rpartition('.jsonl')[0]}.jsonl"
            self.begins[name] = min(document["at"], self.begins.get(name, document["at"]))

    def _document(self, line: bytes) -> dict[str, Any] | None:
        """Return a line as it was written, where it is about the job and not about another one of its unit."""
        document = _parsed(line)
        if document is None:
            return None
        one, several = document.get("job_id"), document.get("job_ids")
        is_about = one == self._job_id if one is not None else self._job_id in several if several else False
        return document if is_about else None


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return a line of a log; None for one that was cut short: its writer was killed, or its disk was full."""
    try:
        document = json.loads(line)
    except ValueError:
        return None
    is_line = isinstance(document, dict) and isinstance(document.get("at"), int | float)
    return document if is_line else None
