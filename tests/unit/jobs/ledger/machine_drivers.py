"""What the state machine does as drivers: claims, attempts, faults, and writes without a lease."""

import pytest
from hypothesis import strategies as st

from jobs.errors import CancelledError, FailureClass, InternalError, LeaseLostError
from jobs.ledger.pauses import Scope
from jobs.ledger.records import Fault
from jobs.states import (
    ACTIVE_STATES,
    CLAIMABLE_STATES,
    Decision,
    JobState,
)
from tests.releases import advance, begin, progress_of, settle
from tests.unit.jobs.ledger.machine_model import (
    FAULTY,
    HOUR,
    STAGES,
    FaultPause,
    a_release,
    covers,
)
from tests.unit.jobs.ledger.machine_people import OWNERS, People

ENDINGS = (JobState.PUBLISHED, JobState.RETRY_WAIT, JobState.QUEUED, JobState.FAILED, JobState.QUARANTINED)


class Drivers(People):
    """Claim jobs and work on them."""

    def queue_orphans(self):
        lost = [job for job in self.model.values() if job.expired]
        for job in lost:
            job.expired = False
            if job.has_begun:  # those at work for the second time in a row wait
                job.attempts, job.losses, job.lost_with = job.attempts - 1, job.losses + 1, job.owner
                job.waits = job.losses > 1
                job.state = JobState.RETRY_WAIT if job.waits else JobState.QUEUED
            else:
                job.state = JobState.CANCELLED if job.state is JobState.CANCELLING else JobState.QUEUED
        owners = {job.owner for job in lost}
        for job in self.model.values() if lost else ():
            if job.lost_with not in owners and not (job.state in ACTIVE_STATES and job.owner in owners):
                job.losses = 0

    def claim(self, data):
        owner = data.draw(st.sampled_from(OWNERS))
        limit = data.draw(st.integers(1, 3))
        self.queue_orphans()
        leases = self.store.claim(owner, limit, HOUR)
        if (Scope.QUEUE, "") in self.paused:
            assert leases == ()
            return
        for fault in self.faults.values():
            if fault.probe is not None and self.model[fault.probe].state not in ACTIVE_STATES:
                self.seen["probe is lost"] += 1
                fault.probe = None
        waiting = {name: job for name, job in self.model.items() if job.state in CLAIMABLE_STATES and not job.waits}
        probes = [lease.job_id for lease in leases if lease.is_probe]
        for job_id in probes:
            # Only places that may be tried keep it back, and no other job tries them.
            job = waiting.pop(job_id)
            its = [fault for key, fault in self.faults.items() if covers(key, job)]
            assert its
            assert all(fault.is_over and fault.probe is None for fault in its)
            assert not any(covers(key, job) for key in self.paused)
            self.seen["probe"] += 1
            for fault in its:
                fault.probe = job_id
        keys = self.paused | self.faults.keys()
        free = [job for job in waiting.values() if not any(covers(key, job) for key in keys)]
        free.sort(key=lambda job: (-job.priority, job.number))
        assert [lease.job_id for lease in leases if not lease.is_probe] == [job.job_id for job in free[:limit]]
        for lease in leases:
            self.take(lease, owner)

    def take(self, lease, owner):
        job = self.model[lease.job_id]
        assert lease.token == job.token + 1
        assert (lease.attempts, lease.excused_faults) == (job.attempts + 1, job.excused)
        assert (lease.approval is not None) == job.approved
        job.state, job.token, job.owner, job.waits = JobState.LEASED, lease.token, owner, False
        job.tokens.append(lease.token)

    def draw_held(self, data):
        """Draw a job whose lease holds."""
        return self.model[data.draw(st.sampled_from(self.held()))]

    def begin(self, data):
        job = self.draw_held(data)
        if job.state is JobState.LEASED:
            begin(self.store, job.job_id, job.token)
            job.state, job.attempts = JobState.PLANNING, job.attempts + 1
            return
        expected = CancelledError if job.state is JobState.CANCELLING else InternalError
        with pytest.raises(expected):
            begin(self.store, job.job_id, job.token)

    def advance(self, data):
        job = self.draw_held(data)
        state = data.draw(st.sampled_from(STAGES[1:]))
        if job.state is JobState.LEASED:
            with pytest.raises(InternalError, match="expected `begin`"):
                self.store.advance({job.job_id: job.token}, state)
            return
        errors = self.store.advance({job.job_id: job.token}, state)
        if job.state is JobState.CANCELLING:
            assert isinstance(errors.pop(job.job_id), CancelledError)
        elif STAGES.index(job.state) < STAGES.index(state):
            job.state = state
            self.tell_passed(job)
        assert errors == {}

    def tell_passed(self, job):
        """Say how far a job is: what it was sent to try works, where that is further than the fault was."""
        order = (JobState.LEASED, *STAGES, JobState.PUBLISHED)
        passed = {
            key
            for key, fault in self.faults.items()
            if fault.probe == job.job_id and order.index(job.state) > order.index(fault.state)
        }
        assert {(pause.scope, pause.name) for pause in self.store.passed(job.job_id, job.state)} == passed
        for key in passed:
            self.seen["place works again"] += 1
            del self.faults[key]

    def end_the_attempt(self, data):
        ending = data.draw(st.sampled_from(ENDINGS))
        is_told = not data.draw(st.booleans())  # else the driver dies before it can tell what it means for places
        job = self.draw_held(data)
        if ending is JobState.PUBLISHED:
            settle(self.store, job.job_id, job.token, a_release(job.job_id), None)
            job.state, job.was_published, job.excused, job.losses = ending, True, 0, 0
            if is_told:
                self.tell_passed(job)
            return
        if ending is JobState.QUEUED:
            self.store.let_go(job.job_id, job.token, "drain")
            job.attempts -= job.has_begun
        else:
            decision = Decision(state=ending, delay_seconds=HOUR)
            self.store.fail(job.job_id, job.token, FailureClass.TRANSIENT_IO, "gone", decision)
        job.state = JobState.CANCELLED if job.state is JobState.CANCELLING else ending
        job.waits = job.state is JobState.RETRY_WAIT
        if is_told:
            self.store.probe_ended(job.job_id)
            for fault in self.faults.values():
                fault.probe = None if fault.probe == job.job_id else fault.probe

    def ask_for_approval(self, data):
        job = self.draw_held(data)
        if job.state in (JobState.LEASED, JobState.PLANNING, JobState.PUBLISHING):
            with pytest.raises(InternalError, match="no way leads from"):
                self.store.await_approval(job.job_id, job.token, "a" * 64, None, {})
        if job.state is JobState.LEASED:
            begin(self.store, job.job_id, job.token)
            job.state, job.attempts = JobState.PLANNING, job.attempts + 1
        if job.state in (JobState.PLANNING, JobState.MERGING):
            assert self.store.advance({job.job_id: job.token}, JobState.VERIFYING) == {}
            job.state = JobState.VERIFYING
            self.tell_passed(job)
        if job.state is JobState.PUBLISHING:
            return
        is_cancelled = job.state is JobState.CANCELLING
        job.state = JobState.CANCELLED if is_cancelled else JobState.AWAITING_APPROVAL
        assert self.store.await_approval(job.job_id, job.token, "a" * 64, None, {}) is job.state
        job.attempts, job.approved = 0, False
        self.seen["asked for approval"] += not is_cancelled

    def meet_a_fault(self, data):
        job = self.draw_held(data)
        place = data.draw(st.sampled_from(FAULTY))
        delay = data.draw(st.sampled_from([None, None, HOUR]))
        if job.state is JobState.CANCELLING:
            return
        if delay is None:
            self.pause_place(job, place, data.draw(st.sampled_from([0.0, 0.0, HOUR])))
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            return  # the driver dies here, or goes on with other things first
        self.give_back(job, place, delay)

    def try_a_place(self, data):
        """Go through what rarely comes together: a place at fault, and what becomes of the job that tries it."""
        job = self.draw_held(data)
        if job.state is JobState.CANCELLING:
            return
        place = data.draw(st.sampled_from([place for place in FAULTY if covers((Scope.PLACE, place), job)]))
        self.pause_place(job, place, 0.0)
        self.give_back(job, place, None)
        self.claim(data)  # which finds that it is covered
        self.claim(data)
        probes = {fault.probe for fault in self.faults.values()}
        for probe in (self.model[name] for name in self.held() if name in probes):
            become = data.draw(st.sampled_from(["published", "at fault again", "lost", "still at it"]))
            if become == "published":
                settle(self.store, probe.job_id, probe.token, a_release(probe.job_id), None)
                probe.state, probe.was_published, probe.excused, probe.losses = JobState.PUBLISHED, True, 0, 0
                self.tell_passed(probe)
            elif become == "at fault again" and probe.state is not JobState.CANCELLING:
                self.pause_place(probe, place, 0.0)
                self.give_back(probe, place, None)
            elif become == "lost":
                self.expire(probe)
        self.claim(data)

    def give_back(self, job, place, delay):
        fault = Fault(place=place, failure=FailureClass.TRANSIENT_IO, message="gone", delay_seconds=delay)
        self.store.let_go(job.job_id, job.token, "at fault", fault)
        job.attempts -= job.has_begun
        job.excused += 1
        job.state = JobState.QUEUED if delay is None else JobState.RETRY_WAIT
        job.waits = delay is not None

    def pause_place(self, job, place, rest):
        key = (Scope.PLACE, place)
        before = self.faults.get(key)
        pause = self.store.pause_place(
            place,
            job.job_id,
            by=job.owner,
            failure=FailureClass.TRANSIENT_IO,
            reason="gone",
            state=job.state,
            first_seconds=rest,
            max_seconds=HOUR,
        )
        is_news = before is None or before.probe == job.job_id
        assert (pause is not None) == is_news
        if is_news:
            self.seen["place still at fault"] += before is not None
            self.faults[key] = FaultPause(job.state, (before.num_faults if before else 0) + 1, is_over=not rest)

    def extend_and_ask(self, _data):
        leases = {job_id: job.token for job_id, job in self.model.items()}
        held = {job_id for job_id, job in self.model.items() if job.is_held}
        for owner in OWNERS:
            own = {job_id for job_id in held if self.model[job_id].owner == owner}
            assert self.store.extend(owner, leases, HOUR) == leases.keys() - own
            stale = {job_id: token - 1 for job_id, token in leases.items()}
            assert self.store.extend(owner, stale, HOUR) == leases.keys()
        lost = self.store.report_progress(progress_of(leases, stage="merge", bytes_done=1, bytes_total=2))
        assert lost == leases.keys() - held
        cancelling = {job_id for job_id, job in self.model.items() if job.state is JobState.CANCELLING}
        assert self.store.cancelling(leases) == cancelling

    def write_without_the_lease(self, data):
        is_stale = data.draw(st.booleans())
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        job = self.model[job_id]
        if job.is_held and not is_stale:
            return
        token = job.token - is_stale
        for write in (
            lambda: begin(self.store, job_id, token),
            lambda: advance(self.store, job_id, token, JobState.MERGING),
            lambda: settle(self.store, job_id, token, a_release(job_id), None),
            lambda: self.store.fail(job_id, token, FailureClass.INTERNAL, "x", Decision(state=JobState.FAILED)),
            lambda: self.store.isolate(job_id, token, FailureClass.WORKER_LOST, "x", "x"),
            lambda: self.store.let_go(job_id, token, "x"),
            lambda: self.store.await_approval(job_id, token, "a" * 64, None, {}),
        ):
            with pytest.raises(LeaseLostError):
                write()
