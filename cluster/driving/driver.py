"""The driver: claims jobs, gives them to workers, and writes down what becomes of them. The only writer of job state.

One `step` is: keep leases, claim, schedule, collect, settle. It waits for workers for `poll_seconds` at most. All that
this process knows can be lost: leases run out, and the next driver goes on.
"""

import contextlib
import dataclasses
import logging
import math
import os
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from cluster.driving.answers import AnswerHandler
from cluster.driving.events import DriverEvent, Shielded, Summary, UnitStarted
from cluster.driving.helping import Helping
from cluster.driving.holdings import Held, Holdings
from cluster.driving.ports import Clock, Metrics, Pool
from cluster.driving.progress import ProgressNotes
from cluster.driving.replies import PoolEvent
from cluster.driving.scheduler import Limits, WorkerView, schedule
from cluster.driving.settlement import CANCELLED, STORE_FAULTS, Settlement
from cluster.settings import Settings
from jobs.ledger.store import JobStore
from jobs.states import MAX_EXCUSED_LOSSES

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
        self._settlement = Settlement(
            store,
            self._holdings,
            policy=settings.retry_policy,
            metrics=metrics,
            listener=listener,
            rng=rng or random.Random(),  # noqa: S311 - jitter, not secrets
        )
        self._helping = Helping(self._holdings, pool, owner=owner, listener=listener)
        self._progress = ProgressNotes(self._holdings, pool, self._settlement)
        self._answers = AnswerHandler(
            self._holdings, pool, self._settlement, progress=self._progress, metrics=metrics, listener=listener
        )
        self._passed_over: dict[str, int] = {}
        self._events: deque[PoolEvent] = deque()
        self._leases_kept_at = clock()
        self._releases_written_at = -math.inf
        self._cancellations_asked_at = -math.inf
        self._observe_at = -math.inf
        self._stopping = False

    def run(self, *, drain: bool) -> Summary:
        """Step until stopped, or, when draining, until nothing is left that could still become claimable.

        Draining waits for jobs that other drivers hold and for jobs that wait to be tried again. A store that does not
        answer is asked again, until the driver is stopped.

        Raises:
            WorkerLostError: the workers do not start.
            TransientIOError, NoCapacityError: the store cannot be written to while the driver is being stopped.
        """
        while True:
            try:
                self.step()
                done = not self._holdings and (self._stopping or (drain and self._store.seconds_until_due() is None))
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
        self._pass_on_cancellations()
        views = self._pool.views()
        if self._stopping:
            self._let_go()
        else:
            for held in self._helping.stranded(views, self._clock()):
                self._settlement.let_go(held, "no worker of the kind that began it is left")
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
        """Return what became of the jobs so far."""
        return self._settlement.summary()

    def _keep_leases(self) -> None:
        if not self._holdings or self._clock() - self._leases_kept_at < self._settings.lease_seconds / 3:
            return
        for job_id in self._store.extend(self._owner, self._holdings.tokens, self._settings.lease_seconds):
            self._drop(job_id)
        self._leases_kept_at = self._clock()

    def _drop(self, job_id: str) -> None:
        """Forget a job that another driver may hold by now; what a worker still does for it is stopped."""
        logger.warning("lease lost", extra={"job_id": job_id})
        worker = self._holdings.remove(job_id)
        if worker is not None:
            self._pool.cancel(worker, (job_id,))

    def _pass_on_cancellations(self) -> None:
        if not self._holdings or self._clock() - self._cancellations_asked_at < self._settings.poll_seconds:
            return
        self._cancellations_asked_at = self._clock()
        asked = self._store.cancelling(self._holdings.tokens)
        if not asked:
            return
        for held in [held for held in self._holdings.waiting.values() if held.job_id in asked]:
            self._settlement.failure(held, CANCELLED)
        for worker in list(self._holdings.flights):
            self._cancel(worker, [held for held in self._holdings.at_work(worker) if held.job_id in asked])

    def _let_go(self) -> None:
        for held in list(self._holdings.waiting.values()):
            self._settlement.failure(held, CANCELLED)
        for worker in list(self._holdings.flights):
            self._cancel(worker, self._holdings.at_work(worker))

    def _cancel(self, worker: str, jobs: list[Held]) -> None:
        """Tell those at a unit to stop jobs; said again in every round, since it only reaches a unit that has begun."""
        if not jobs:
            return
        shared = self._holdings.flights[worker].shared
        if shared is not None and shared.is_open and not shared.at_work and not shared.finishing:
            for held in jobs:  # no worker is left that could say that it stopped
                self._settlement.failure(held, CANCELLED)
            return
        for held in jobs:
            held.cancel_sent = True
        for each in self._holdings.crew(worker):
            self._pool.cancel(each, [held.job_id for held in jobs])

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
            leases = self._store.claim(self._owner, limit, self._settings.lease_seconds)
            for lease in leases:
                if lease.job_id in self._holdings.tokens:  # its last lease ran out before it was extended
                    self._drop(lease.job_id)
            self._holdings.add(leases)
            for lease in leases:
                if lease.excused_losses > MAX_EXCUSED_LOSSES:
                    self._settlement.quarantine(self._holdings.waiting[lease.job_id])

    def _start_units(self, pool_views: Sequence[WorkerView]) -> None:
        # Who leads a unit is not idle, whether it is at it just now or not.
        views = [
            dataclasses.replace(view, idle=False) if view.idle and view.name in self._holdings.flights else view
            for view in pool_views
        ]
        if not self._holdings.waiting or not any(view.idle for view in views):
            return
        limits = Limits(
            max_jobs_per_pass=self._settings.max_jobs_per_pass,
            max_units_of_other_bases=self._settings.max_units_of_other_bases * len(views),
        )
        plan = schedule(self._holdings.waiting_jobs(), views, self._passed_over, limits)
        self._passed_over = plan.passed_over
        for unit in plan.units:
            flight = self._holdings.start(unit)
            name = flight.name("plan" if unit.shared else "merge")
            if unit.shared:
                self._helping.open(unit.worker, flight, name)
            else:
                self._pool.run_unit(unit.worker, name, flight.requests)
            logger.info("unit started", extra={"worker": unit.worker, "unit": name, "job_ids": list(unit.job_ids)})
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


@contextlib.contextmanager
def stop_on_signals(driver: Driver) -> Iterator[None]:
    """While this lasts, SIGINT and SIGTERM stop the driver in order; the second one ends the process at once."""

    def on_signal(number: int, _: FrameType | None) -> None:
        if driver.stopping:
            os._exit(128 + number)
        driver.stop()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
