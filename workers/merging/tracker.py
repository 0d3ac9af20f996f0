"""How far a unit is, and which of its jobs should stop: written by the threads that work, read by those that ask."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from jobs.errors import CancelledError
from workers.merging.outcomes import Progress

logger = logging.getLogger(__name__)


class Tracker:
    """Progress, cancellation and the time each stage took; all methods are safe from any thread."""

    def __init__(self, unit: str, job_ids: Iterable[str], cancelled: Callable[[], frozenset[str]]) -> None:
        self._unit = unit
        self._stages = dict.fromkeys(job_ids, "fetch")
        self._cancelled = cancelled
        self._bytes_done = 0
        self._bytes_total = 0
        self._lock = threading.Lock()
        self.seconds: dict[str, float] = {}
        """Wall time by stage."""

    def progress(self) -> Progress:
        """Return where the unit is now."""
        with self._lock:
            return Progress(
                unit=self._unit,
                stages=dict(self._stages),
                bytes_done=self._bytes_done,
                bytes_total=self._bytes_total,
            )

    def rename(self, unit: str) -> None:
        """Say what the unit is called from now on."""
        with self._lock:
            self._unit = unit

    def expect(self, num_bytes: int) -> None:
        """Say that this many bytes are still to come."""
        with self._lock:
            self._bytes_total += num_bytes

    def advance(self, num_bytes: int) -> None:
        """Say that this many bytes were done."""
        with self._lock:
            self._bytes_done += num_bytes

    def enter(self, stage: str, job_ids: Iterable[str]) -> None:
        """Say that jobs are in a stage now."""
        ids = list(job_ids)
        with self._lock:
            self._stages.update(dict.fromkeys(ids, stage))
        if ids:
            logger.info("stage begun", extra={"unit": self._unit, "stage": stage, "job_ids": ids})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of a block towards a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    def shift(self, stage: str, to: str, seconds: float) -> None:
        """Count some of the time of a stage towards another one, which ran inside it."""
        with self._lock:
            self.seconds[stage] -= seconds
            self.seconds[to] = self.seconds.get(to, 0.0) + seconds

    def check(self, job_id: str) -> None:
        """Raise CancelledError when this job was asked to stop."""
        if job_id in self._cancelled():
            raise CancelledError(f"job {job_id} was cancelled")

    def check_all(self, job_ids: Iterable[str]) -> None:
        """Raise CancelledError when all of these jobs were asked to stop: what they share has no use any more."""
        wanted = frozenset(job_ids)
        if wanted and wanted <= self._cancelled():
            raise CancelledError(f"all jobs of {self._unit} were cancelled")
