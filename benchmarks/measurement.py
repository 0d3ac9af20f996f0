"""Runs a command and measures it from outside: seconds, peak memory that is not file pages, bytes read and written."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.05
_NON_FILE_PAGES = re.compile(rb"^Pss_(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)
"""Pages that several processes have (a fork and its parent) are divided among them, so that a sum counts them once."""
_CHARACTERS = re.compile(rb"^([rw])char: (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of a command, its children included."""

    seconds: float
    peak_memory_bytes: int
    """Largest sum of anonymous and shared pages over the process tree, each once; pages of mapped files are not
    counted."""
    bytes_read: int
    """Through system calls (`rchar` in proc(5)); what is read through a mapping is not in it."""
    bytes_written: int
    """Through system calls (`wchar`), kernel-side copies included."""
    output: str
    """What it wrote to standard output."""


def measure(command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> Measurement:
    """Run a command to its end.

    Args:
        command: program and arguments.
        environment: all of its environment.
        log: receives its standard error.

    Raises:
        RuntimeError: it failed; the message ends with the last lines of what it said.
    """
    start = time.perf_counter()
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        peak = PeakMemory(process.pid)
        output = process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead but not reaped: its counters can be read
        seconds = time.perf_counter() - start
        num_read, num_written = bytes_moved(process.pid)
        peak_memory_bytes = peak.stop()
    if process.returncode != 0:
        said = output.decode(errors="replace").splitlines()[-20:] + log.read_text(errors="replace").splitlines()[-20:]
        tail = "\n".join(said)
        raise RuntimeError(f"{command[0]} ended with exit code {process.returncode}:\n{tail}")
    return Measurement(
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes,
        bytes_read=num_read,
        bytes_written=num_written,
        output=output.decode(),
    )


def bytes_moved(pid: int) -> tuple[int, int]:
    """Return the bytes a process, and its children that have ended, read and wrote through system calls."""
    counters = dict(_CHARACTERS.findall(Path(f"/proc/{pid}/io").read_bytes()))
    return int(counters[b"r"]), int(counters[b"w"])


class PeakMemory:
    """Samples a process tree in a thread until it is told to stop."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End the sampling and return the largest sum seen, in bytes."""
        self._stopped.set()
        self._thread.join()
        return self._peak_bytes

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self._peak_bytes = max(self._peak_bytes, sum(map(_non_file_bytes, _tree(self._pid))))


def _tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    pids = [pid]
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                pids.extend(map(int, children.read_text().split()))
            except (FileNotFoundError, ProcessLookupError):
                continue  # the thread ended while we looked
    return pids


def _non_file_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(map(int, _NON_FILE_PAGES.findall(status)))
