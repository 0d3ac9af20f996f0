"""What the state machine does to the ledger, and to its model, as people and as time."""

from collections import Counter

import pytest
from hypothesis import strategies as st
from sqlalchemy import update

from jobs.errors import BadInputError, NotFoundError
from jobs.ledger.pauses import Cause, Scope
from jobs.ledger.schema import jobs, pauses
from jobs.ledger.store import JobStore
from jobs.states import (
    ACTIVE_STATES,
    LIVE_STATES,
    RETRYABLE_STATES,
    WAITING_STATES,
    JobState,
)
from tests.unit.jobs.ledger.machine_model import (
    BATCHES,
    IDS,
    PAUSABLE,
    FaultPause,
    Job,
    a_request,
    covers,
)

OWNERS = ("driver-1", "driver-2")


class People:
    """Submit, cancel, retry, pause; let time pass and drivers die."""

    store: JobStore
    model: dict[str, Job]
    batches: set[str]
    paused: set[tuple[Scope, str]]
    """What people have paused."""
    faults: dict[tuple[Scope, str], FaultPause]
    seen: Counter[str]
    """How often rare things have happened, over all examples."""

    def sql(self, statement):
        with self.store._database.write() as connection:
            connection.execute(statement)

    def holders(self, destination):
        return {name for name, job in self.model.items() if job.destination == destination and job.state in LIVE_STATES}

    def held(self):
        """Return the jobs whose lease holds: those first that find out whether a place works."""
        probes = {fault.probe for fault in self.faults.values()}
        names = (name for name, job in self.model.items() if job.is_held)
        return sorted(names, key=lambda name: (name not in probes, name))

    # People.

    def submit_some(self, data):
        places = st.tuples(st.integers(0, 2), st.integers(0, 1))
        wanted = data.draw(st.dictionaries(st.sampled_from(IDS), places, min_size=1, max_size=3))
        self.submit(wanted, data.draw(st.sampled_from(BATCHES)))

    def submit(self, wanted, batch):
        requests = [a_request(job_id, *rest) for job_id, rest in wanted.items()]
        new = {job_id: rest for job_id, rest in wanted.items() if job_id not in self.model}
        destinations = Counter(destination for destination, _ in new.values())
        is_refused = (
            any(
                job_id in self.model and rest != (self.model[job_id].destination, self.model[job_id].priority)
                for job_id, rest in wanted.items()
            )
            or any(self.holders(destination) for destination in destinations)
            or any(count > 1 for count in destinations.values())
        )
        if is_refused:
            with pytest.raises(BadInputError):
                self.store.submit(requests, batch)
            return
        assert self.store.submit(requests, batch).created == tuple(new)
        for job_id, (destination, priority) in new.items():
            self.model[job_id] = Job(job_id, len(self.model), destination, priority, batch)
            self.batches.add(batch)

    def cancel(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        job = self.model[job_id]
        changes = job.state in WAITING_STATES or job.state in ACTIVE_STATES - {JobState.CANCELLING}
        assert self.store.cancel([job_id]) == ((job_id,) if changes else ())
        if job.state in WAITING_STATES:
            job.state, job.waits = JobState.CANCELLED, False
        elif job.state in ACTIVE_STATES:
            job.state = JobState.CANCELLING
        self.queue_orphans()

    def answer(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        job = self.model[job_id]
        is_yes = data.draw(st.booleans())
        changed = self.store.approve([job_id], "ann") if is_yes else self.store.reject([job_id], "ann", "no")
        assert changed == ((job_id,) if job.state is JobState.AWAITING_APPROVAL else ())
        if changed:
            job.state, job.approved = JobState.QUEUED if is_yes else JobState.CANCELLED, is_yes

    def retry(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        job = self.model[job_id]
        if job.state in RETRYABLE_STATES and self.holders(job.destination) - {job_id}:
            with pytest.raises(BadInputError):
                self.store.retry([job_id])
            return
        assert self.store.retry([job_id]) == ((job_id,) if job.state in RETRYABLE_STATES else ())
        if job.state in RETRYABLE_STATES:
            job.state, job.attempts, job.excused, job.waits, job.losses = JobState.QUEUED, 0, 0, False, 0
            job.approved = False

    def pause(self, data):
        key = data.draw(st.sampled_from(PAUSABLE))
        scope, name = key
        is_known = {
            Scope.BATCH: name in self.batches,
            Scope.BASE: any(covers(key, job) for job in self.model.values()),
        }.get(scope, True)
        if not is_known:
            with pytest.raises(NotFoundError):
                self.store.pause(scope, name, "ann", "why")
            return
        assert self.store.pause(scope, name, "ann", "why") == (key not in self.paused)
        self.paused.add(key)

    def resume(self, data):
        keys = sorted(self.paused | self.faults.keys()) or PAUSABLE
        key = data.draw(st.sampled_from(keys))
        ended = self.store.resume(*key)
        assert {pause.cause for pause in ended} == (
            {Cause.OPERATOR for each in self.paused if each == key}
            | {Cause.FAULT for each in self.faults if each == key}
        )
        self.paused.discard(key)
        self.faults.pop(key, None)

    # Time.

    def lose_a_driver(self, data):
        self.expire(self.model[data.draw(st.sampled_from(self.held()))])

    def expire(self, job):
        self.sql(update(jobs).where(jobs.c.id == job.job_id).values(lease_expires_at=1))
        job.expired = True

    def release_leases(self, data):
        owner = data.draw(st.sampled_from(OWNERS))
        its = [job for job in self.model.values() if job.is_held and job.owner == owner]
        assert self.store.release_leases(owner) == len(its)
        for job in its:
            job.expired = True

    def wait_for_retries(self, _data):
        self.sql(update(jobs).where(jobs.c.not_before.is_not(None)).values(not_before=1))
        for job in self.model.values():
            job.waits = False

    def end_rests(self, _data):
        self.sql(update(pauses).where(pauses.c.probe_at.is_not(None)).values(probe_at=1))
        for fault in self.faults.values():
            fault.is_over = True
