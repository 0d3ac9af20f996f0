"""The driver: claims jobs, gives them to workers, and writes down what becomes of them. The only writer of job state.

One `step` is: keep leases, claim, schedule, collect, settle. It waits for workers for `poll_seconds` at most. All that
this process knows can be lost: leases run out, and the next driver goes on.
"""

import dataclasses
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.driving.answers import AnswerHandler
from cluster.driving.drops import drop
from cluster.driving.endings import Endings
from cluster.driving.events import DriverEvent, Shielded, Summary, UnitStarted
from cluster.driving.helping import Helping
from cluster.driving.holdings import Holdings
from cluster.driving.places import Places
from cluster.driving.ports import Clock, Metrics, Pool
from cluster.driving.progress import ProgressNotes
from cluster.driving.replies import PoolEvent
from cluster.driving.scheduler import Limits, WorkerView, schedule
from cluster.driving.settlement import CANCELLED, STORE_FAULTS, Settlement
from cluster.settings import Settings
from jobs.errors import FailureClass
from jobs.ledger.store import JobStore
from jobs.states import FINAL_STATES, MAX_DRIVER_LOSSES, JobState
from workers.merging.outcomes import Failure

logger = logging.getLogger(__name__)

_MAX_OBSERVING = 0.002
"""Share of its time that a driver spends on the figures of the whole ledger."""


class Driver:
    """Drives the jobs of one store through the workers of one pool."""

    def __init__(
        self,
        store: JobStore,
        pool: Pool,
        settings: Settings,
        metrics: Metrics,
        *,
        owner: str,
        listener: Callable[[DriverEvent], None],
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        """Take a store and a pool; both stay the caller's to close.

        Args:
            store: the ledger.
            pool: the workers.
            settings: lease, polling, pass and retry settings.
            metrics: where figures go.
            owner: names this driver in the store.
            listener: told of every event, in this thread. What it raises is logged, and changes nothing.
            clock: seconds that only go forward.
            sleep: waits so many seconds.
            rng: source of the jitter between attempts.
        """
        self._store = store
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._owner = owner
        self._listener = listener = Shielded(listener)
        self._clock = clock
        self._sleep = sleep
        self._holdings = Holdings()
        rng = rng or random.Random()  # noqa: S311 - jitter, not secrets
        policy = settings.failure_policy
        self._places = Places(store, policy, owner=owner, metrics=metrics, listener=listener, clock=clock, rng=rng)
        self._endings = Endings(
            store,
            self._holdings,
            places=self._places,
            policy=policy,
            metrics=metrics,
            listener=listener,
            rng=rng,
        )
        self._settlement = Settlement(store, self._holdings, self._places, self._endings)
        self._helping = Helping(self._holdings, pool, owner=owner, listener=listener)
        self._progress = ProgressNotes(self._holdings, self._settlement)
        self._answers = AnswerHandler(
            self._holdings, pool, self._settlement, progress=self._progress, metrics=metrics, listener=listener
        )
        self._passed_over: dict[str, int] = {}
        self._events: deque[PoolEvent] = deque()
        self._leases_kept_at = clock()
        self._releases_written_at = -math.inf
        self._asked_at = -math.inf
        self._observe_at = -math.inf
        self._stopping = False
        self._stopping_since: float | None = None

    def run(self, *, drain: bool) -> Summary:
        """Step until stopped, or, when draining, until nothing is left that could still become claimable.

        Draining waits for jobs that other drivers hold, for jobs that wait to be tried again and for places to work
        again; not for what people have paused. A store that does not answer is asked again, until the driver is
        stopped.

        Raises:
            WorkerLostError: the workers do not start.
            TransientIOError, NoCapacityError: the store cannot be written to while the driver is being stopped.
        """
        while True:
            try:
                self.step()
                done = self._has_stopped() or (drain and not self._holdings and self._store.seconds_until_due() is None)
            except STORE_FAULTS as error:
                if self._stopping:
                    raise
                logger.warning("store does not answer", extra={"reason": str(error)})
                self._sleep(self._settings.poll_seconds)
            else:
                if done:
                    return self.summary()

    def stop(self) -> None:
        """Claim nothing more, give back what has not started, stop what has. Safe in a signal handler."""
        self._stopping = True

    @property
    def stopping(self) -> bool:
        """Whether a signal or a caller asked it to stop."""
        return self._stopping

    def step(self) -> None:
        """Do one round; waits for workers for `poll_seconds` at most.

        Raises:
            TransientIOError, NoCapacityError: the store cannot be written to; no event is lost.
        """
        self._handle_events()  # those that the last round could not write down
        self._keep_leases()
        self._look_around()
        self._stop_late()
        views = self._pool.views()
        if self._stopping:
            self._hand_back()
        for held in self._helping.stranded(views, self._clock()):
            self._settlement.let_go(held, "no worker of the kind that began it is left")
        drop(self._holdings, self._pool, views)
        if not self._stopping:
            self._claim(views)
            self._start_units(views)
        self._helping.step(() if self._stopping else views)
        events = self._pool.poll(self._settings.poll_seconds)
        self._events.extend(events)
        self._handle_events()
        # No job waits for the record of a release: while much goes on, many are written at once.
        if not events or self._clock() - self._releases_written_at >= self._settings.poll_seconds:
            self._settlement.write_releases()
            self._releases_written_at = self._clock()
        self._observe()

    def summary(self) -> Summary:
        """Return what became of the jobs so far, and what is left of the ledger."""
        counts = self._store.counts()
        return self._endings.tally.summary(sum(count for state, count in counts.items() if state not in FINAL_STATES))

    def _keep_leases(self) -> None:
        if self._clock() - self._leases_kept_at < self._settings.lease_seconds / 3:
            return
        if self._holdings:
            for job_id in self._store.extend(self._owner, self._holdings.tokens, self._settings.lease_seconds):
                self._forget(job_id)
        self._store.see_driver(self._owner)  # one that is idle, too: it is at work for those who ask
        self._leases_kept_at = self._clock()

    def _forget(self, job_id: str) -> None:
        """Forget a job that another driver may hold by now; its workers are told to drop it."""
        logger.warning("lease lost", extra={"job_id": job_id})
        self._holdings.remove(job_id)

    def _look_around(self) -> None:
        """Read what people and other drivers have changed: cancellations, and what is paused."""
        if self._clock() - self._asked_at < self._settings.poll_seconds:
            return
        self._asked_at = self._clock()
        self._places.refresh()
        if self._holdings:
            asked = self._store.cancelling(self._holdings.tokens)
            for held in self._holdings.not_staged():
                if held.job_id in asked:
                    self._settlement.failure(held, CANCELLED)

    def _stop_late(self) -> None:
        """End attempts that take longer than their requests allow."""
        now = self._clock()
        for held in self._holdings.not_staged():
            limit = held.lease.request.timeout_seconds
            if limit is not None and held.state is not JobState.LEASED and now - held.began_at > limit:
                message = f"its attempt took longer than timeout_seconds of its request, {limit:g}"
                self._settlement.failure(held, Failure(failure_class=FailureClass.TIMED_OUT, message=message))

    def _hand_back(self) -> None:
        """Give back what is not being published: nothing that workers still do for it can become visible."""
        if self._stopping_since is None:
            self._stopping_since = self._clock()
        for held in self._holdings.not_staged():
            self._settlement.let_go(held, "the driver stopped")

    def _has_stopped(self) -> bool:
        """Whether it was stopped and holds nothing more, or has waited long enough for what is being published."""
        if self._stopping_since is None:
            return False
        is_late = self._clock() - self._stopping_since > self._settings.stop_seconds
        if self._holdings and is_late:
            logger.warning(
                "stopped with releases on their way; their leases run out",
                extra={"job_ids": sorted(self._holdings.tokens)},
            )
        return not self._holdings or is_late

    def _claim(self, views: Sequence[WorkerView]) -> None:
        """Lease what the workers can soon take; the rest stays with the store, for other drivers too."""
        num_idle = sum(view.idle for view in views)
        # Twice what the fleet can run, so that jobs of one base can gather while another base is merged.
        wanted = 2 * len(views) * self._settings.max_jobs_per_pass
        room = wanted - len(self._holdings.waiting)
        if room > wanted / 2:
            limit = min(num_idle * self._settings.max_jobs_per_pass, room)
        else:  # there is no hurry: a claim costs the same for many
            limit = room if num_idle and room >= wanted / 4 else 0
        if limit > 0:
            leases = self._store.claim(self._owner, limit, self._settings.lease_seconds, self._settings.share_rules)
            for lease in leases:
                if lease.job_id in self._holdings.tokens:  # its last lease ran out before it was extended
                    self._forget(lease.job_id)
            self._holdings.add(leases)
            for lease in leases:
                if lease.driver_losses > MAX_DRIVER_LOSSES:
                    self._settlement.quarantine(self._holdings.waiting[lease.job_id])

    def _start_units(self, pool_views: Sequence[WorkerView]) -> None:
        # Who leads a unit is not idle, whether it is at it just now or not.
        resting = self._places.resting_hosts()
        views = [
            dataclasses.replace(view, idle=False)
            if view.idle and (view.name in self._holdings.flights or view.host in resting)
            else view
            for view in pool_views
        ]
        if not self._holdings.waiting or not any(view.idle for view in views):
            return
        limits = Limits(
            max_jobs_per_pass=self._settings.max_jobs_per_pass,
            max_units_of_other_bases=self._settings.max_units_of_other_bases * len(views),
        )
        plan = schedule(self._holdings.waiting_jobs(), views, self._passed_over, limits)
        # Begun in the ledger first: a fault of it leaves everything as it was.
        workers = {view.name: view for view in views}
        begun = self._settlement.begin(
            {job_id: workers[unit.worker] for unit in plan.units for job_id in unit.job_ids}, self._clock()
        )
        self._passed_over = plan.passed_over
        for planned in plan.units:
            job_ids = tuple(job_id for job_id in planned.job_ids if job_id in begun)
            if not job_ids:
                continue
            unit = dataclasses.replace(planned, job_ids=job_ids)
            flight = self._holdings.start(unit)
            self._places.try_hosts(flight.held.values())
            name = flight.name("plan" if unit.shared else "merge")
            if unit.shared:
                self._helping.open(unit.worker, flight, name)
            else:
                self._pool.run_unit(unit.worker, name, flight.requests)
            told = {"unit": name, "job_ids": list(unit.job_ids)}
            logger.info("unit started", extra=workers[unit.worker].named | told)
            self._listener(UnitStarted(worker=unit.worker, name=name, job_ids=unit.job_ids))

    def _handle_events(self) -> None:
        while self._events:
            self._answers.handle(self._events[0])
            self._events.popleft()  # only now: should the store not answer, the event is handled again
        self._progress.write()

    def _observe(self) -> None:
        if self._clock() < self._observe_at:
            return
        begin = self._clock()
        self._metrics.observe(
            jobs=self._store.counts(),
            num_waiting=len(self._holdings.waiting),
            num_in_flight=len(self._holdings.flights),
            residents={view.name: len(view.residents) for view in self._pool.views() if view.up},
        )
        # Counting a long ledger takes a while, and must not become what a driver does.
        seconds = self._clock() - begin
        self._observe_at = begin + max(self._settings.poll_seconds, seconds / _MAX_OBSERVING)
