"""Events of a driver, for the terminal or for a program that reads JSON lines."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jobs.errors import FailureClass
from jobs.states import JobState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitStarted:
    """A worker got a unit."""

    worker: str
    name: str
    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsStarted:
    """A worker got pieces of a pass that several share."""

    worker: str
    name: str
    job_ids: tuple[str, ...]
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettled:
    """An attempt ended, and the store says so."""

    job_id: str
    state: JobState
    """Final, AWAITING_APPROVAL, or RETRY_WAIT or QUEUED when it will be tried again."""
    location: str | None = None
    """Where the release is."""
    created: bool = False
    """Whether this attempt wrote the release; False when the same one was there before."""
    failure_class: FailureClass | None = None
    message: str | None = None
    retry_seconds: float | None = None
    """How long it waits before it may be tried again."""
    place: str | None = None
    """Whose fault it was; the attempt does not count then."""
    report_path: str | None = None
    notes: tuple[str, ...] = ()
    """What a person should know before the release is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReplaced:
    """A worker died; another takes its place."""

    worker: str
    reason: str
    job_ids: tuple[str, ...]
    """The jobs it was at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBenched:
    """A worker cannot start, or cannot use its GPU: it gets no jobs. Told once; its place is tried again meanwhile."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacePaused:
    """A place (bucket, Hub, file system, machine) is at fault: what depends on it waits. Told once until it works."""

    place: str
    failure_class: FailureClass
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceResumed:
    """A job got past a place that was paused."""

    place: str


DriverEvent = UnitStarted | ShardsStarted | JobSettled | WorkerReplaced | WorkerBenched | PlacePaused | PlaceResumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What became of the jobs of one driver; a job that was tried again counts once, as it ended."""

    published: int
    unchanged: int
    """The same release was there before, and nothing was written."""
    cancelled: int
    failures: Mapping[FailureClass, int]
    """Jobs that failed for good, by class."""
    left: int = 0
    """Jobs of the ledger that are not final, when the driver ended."""


_NAMES: dict[type, str] = {
    UnitStarted: "unit_started",
    ShardsStarted: "shards_started",
    JobSettled: "job_settled",
    WorkerReplaced: "worker_replaced",
    WorkerBenched: "worker_benched",
    PlacePaused: "place_paused",
    PlaceResumed: "place_resumed",
}


def event_name(event: DriverEvent) -> str:
    """Return what JSON lines call an event."""
    return _NAMES[type(event)]


class Shielded:
    """Tells a listener of events; a fault of it (a display, a pipe that was closed) is not one of the driver."""

    def __init__(self, listener: Callable[[DriverEvent], None]) -> None:
        self._listener = listener
        self._told = False

    def __call__(self, event: DriverEvent) -> None:
        """Tell it."""
        try:
            self._listener(event)
        except Exception as error:
            if not self._told:  # once: what cannot show one event cannot show the next thousand
                logger.exception("an event could not be shown", extra={"event": type(event).__name__})
            self._told = True
            logger.debug("an event could not be shown", extra={"reason": repr(error)})
