"""Places at fault: which failures are theirs and not their jobs', which of them rest, and when they work again."""

import logging
import math
import random
from collections.abc import Callable, Iterable

from cluster.driving.events import DriverEvent, PlacePaused, PlaceResumed
from cluster.driving.holdings import Held
from cluster.driving.ports import Clock, Metrics
from jobs.errors import FailureClass
from jobs.ledger.pauses import Cause, Pause, Scope
from jobs.ledger.records import Fault
from jobs.ledger.store import JobStore
from jobs.places import is_covered, locations_of, node_place, place_of
from jobs.policy import FailurePolicy
from jobs.request import MergeRequest
from jobs.states import JobState
from workers.merging.outcomes import Failure

logger = logging.getLogger(__name__)

MAX_EXCUSED_FAULTS = 20
"""How often a job is not charged with the fault of a place that others got past meanwhile. One that goes on meeting it
is at fault itself."""


class Places:
    """What one driver knows of places; pauses are in the store, for all drivers."""

    def __init__(
        self,
        store: JobStore,
        policy: FailurePolicy,
        *,
        owner: str,
        metrics: Metrics,
        listener: Callable[[DriverEvent], None],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        """Take what it reads, writes to and tells.

        Args:
            store: holds the pauses.
            policy: says which classes of failures pause a place, and for how long.
            owner: names the driver.
            metrics: told how many places are paused.
            listener: told when a place is paused, and when it works again.
            clock: seconds that only go forward.
            rng: source of jitter.
        """
        self._store = store
        self._policy = policy
        self._owner = owner
        self._metrics = metrics
        self._listener = listener
        self._clock = clock
        self._rng = rng
        self._passed_at: dict[str, float] = {}
        """By place, when a job was last published that depends on it; remote ones, and file systems once at fault."""
        self._has_passed: set[str] = set()
        """Places that jobs were published through, this driver's or those of earlier ones."""
        self._met_at: dict[str, float] = {}
        """By job that met a fault, when it did so first."""
        self._denied_at: dict[str, float] = {}
        """By job that a place denied something, when it did so first."""
        self._pauses: tuple[Pause, ...] = ()
        self._now = 0.0

    def refresh(self) -> None:
        """Read the pauses anew."""
        self._pauses, self._now = self._store.pauses(), self._store.now()
        self._metrics.paused({pause.name for pause in self._pauses if pause.scope is Scope.PLACE})

    def fault_of(self, held: Held, failure: Failure) -> Fault | None:
        """Return what else ended an attempt: a fault of a place, or that others had what it needs; None for the job.

        Args:
            held: the job.
            failure: how its attempt ended.
        """
        policy = self._policy[failure.failure_class]
        wait = policy.longest_wait(held.lease.excused_faults + 1)
        if failure.waits:
            return Fault(
                place=None,
                failure=failure.failure_class,
                message=failure.message,
                delay_seconds=self._rng.uniform(wait / 2, wait),
            )
        if failure.place is None or not policy.pauses_place:
            return None
        request = held.lease.request
        is_own = any(is_covered(location, failure.place) for location in locations_of(request))
        # A disk that the request does not name is the worker's: for scratch, caches, reports.
        place = failure.place if is_own or held.host is None else node_place(held.host)
        passed_at = self._passed_at.setdefault(place, -math.inf)
        met_at = self._met_at.setdefault(held.job_id, held.began_at)
        others_passed = passed_at > met_at
        if failure.failure_class is FailureClass.AUTH:
            # Since it was denied, not since it began: credentials may have expired in the meantime.
            others_passed = passed_at > self._denied_at.setdefault(held.job_id, self._clock())
            if others_passed or not self._has_worked(place):
                return None  # credentials that never worked are a matter of the request
        if others_passed and held.lease.excused_faults >= MAX_EXCUSED_FAULTS:
            return None
        return Fault(
            place=place,
            failure=failure.failure_class,
            message=failure.message,
            delay_seconds=self._rng.uniform(0, wait) if others_passed else None,
        )

    def _has_worked(self, place: str) -> bool:
        """Whether a job got past a place before: with this driver, or one that was here before it."""
        if place not in self._has_passed and (self._passed_at[place] > -math.inf or self._store.has_published(place)):
            self._has_passed.add(place)
        return place in self._has_passed

    def pause(self, held: Held, fault: Fault) -> None:
        """Pause the place of a fault, unless others get past it; told once."""
        assert fault.place is not None
        if fault.delay_seconds is not None:
            self.ended(held)
            return
        policy = self._policy[fault.failure]
        pause = self._store.pause_place(
            fault.place,
            held.job_id,
            by=self._owner,
            failure=fault.failure,
            reason=fault.message,
            state=held.state,
            first_seconds=policy.delay_seconds,
            max_seconds=policy.max_delay_seconds,
        )
        if pause is not None:
            said = {"place": fault.place, "reason": fault.message, "job_id": held.job_id}
            logger.warning("place paused", extra=said)
            if pause.num_faults == 1:
                self._listener(PlacePaused(place=fault.place, failure_class=fault.failure, reason=fault.message))
        self.refresh()

    def got_to(self, held: Held, state: JobState) -> None:
        """Note how far a job is: what it was sent ahead to try works, when it is further than the fault was."""
        if state is JobState.PUBLISHED:
            now = self._clock()
            for location in locations_of(held.lease.request):
                if (place := place_of(location)) in self._passed_at or not place.startswith("file://"):
                    self._passed_at[place] = now
            for place in self._passed_at:
                if place.startswith("file://") and _depends_on(held.lease.request, place):
                    self._passed_at[place] = now
            if held.host is not None and (place := node_place(held.host)) in self._passed_at:
                self._passed_at[place] = now
        if held.is_probe:
            for pause in self._store.passed(held.job_id, state):
                logger.info("place works again", extra={"place": pause.name, "job_id": held.job_id})
                self._listener(PlaceResumed(place=pause.name))
                self.refresh()

    def ended(self, held: Held) -> None:
        """Have another job sent ahead, where this one ended for another reason than the place."""
        if held.is_probe:
            self._store.probe_ended(held.job_id)

    def forget(self, held: Held) -> None:
        """Forget a job that is final."""
        self._met_at.pop(held.job_id, None)
        self._denied_at.pop(held.job_id, None)

    def resting_hosts(self) -> frozenset[str]:
        """Return the machines that get no work now."""
        names = {pause.name for pause in self._pauses if pause.scope is Scope.PLACE and not self._is_due(pause)}
        return frozenset(name.removeprefix("node:") for name in names if name.startswith("node:"))

    def try_hosts(self, begun: Iterable[Held]) -> None:
        """Have the first job on each machine that may work again tell whether it does."""
        due = {pause.name for pause in self._pauses if pause.name.startswith("node:") and self._is_due(pause)}
        for held in begun:
            if held.host is not None and (place := node_place(held.host)) in due:
                due.remove(place)
                held.is_probe = True
                self._store.send_probe(place, held.job_id)
                self.refresh()

    def _is_due(self, pause: Pause) -> bool:
        return pause.cause is Cause.FAULT and pause.probe is None and (pause.probe_at or 0.0) <= self._now


def _depends_on(request: MergeRequest, place: str) -> bool:
    return any(is_covered(location, place) for location in locations_of(request))
