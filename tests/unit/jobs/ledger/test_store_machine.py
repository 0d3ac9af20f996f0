"""The store against a model of it: random submissions, claims, losses, failures and cancellations by two drivers."""

import contextlib
import itertools
import sqlite3
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jobs.errors import BadInputError, CancelledError, FailureClass, LeaseLostError
from jobs.ledger.store import JobStore
from jobs.locations import LocalPath
from jobs.parity_report import ParitySummary
from jobs.release import Manifest, Release
from jobs.request import BaseQuantization, MergeRequest
from jobs.states import (
    ACTIVE_STATES,
    CLAIMABLE_STATES,
    FINAL_STATES,
    LIVE_STATES,
    RETRYABLE_STATES,
    TRANSITIONS,
    Decision,
    JobState,
)
from tests.releases import advance, progress_of, settle

IDS = "abcd"
STAGES = (JobState.PLANNING, JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING)
ENDINGS = (
    JobState.RETRY_WAIT,
    JobState.RETRY_WAIT,
    JobState.QUEUED,
    JobState.FAILED,
    JobState.QUARANTINED,
    JobState.PUBLISHED,
)


@dataclass
class Job:
    """What the model knows of one job."""

    number: int
    destination: int
    priority: int
    state: JobState = JobState.QUEUED
    token: int = 0
    attempts: int = 0
    expired: bool = False
    waits: bool = False
    was_published: bool = False
    tokens: list[int] = field(default_factory=list)
    owner: str = ""

    @property
    def is_held(self):
        return self.state in ACTIVE_STATES and not self.expired


def a_request(job_id, destination, priority):
    return MergeRequest(id=job_id, base="/b", adapter="/a", destination=f"/out/{destination}", priority=priority)


def a_release(job_id):
    summary = ParitySummary(
        level="full",
        num_tensors=1,
        num_changed_tensors=1,
        rounding_excess=0.1,
        min_survival=None,
        mean_kl=0.0,
        top1_agreement=1.0,
    )
    manifest = Manifest(
        merge_key="a" * 64,
        request_id=job_id,
        base="/b",
        base_digest="b" * 64,
        adapter="/a",
        adapter_digest="c" * 64,
        base_quantization=BaseQuantization.NF4,
        quantization_options=None,
        dtype=None,
        parity=summary,
        files=(),
        versions={},
    )
    return Release(location=LocalPath(Path("/out")), manifest=manifest, manifest_sha256="d" * 64, created=True)


class StoreMachine(RuleBasedStateMachine):
    @initialize(priorities=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def open(self, priorities):
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "jobs.db"
        self.store = JobStore(f"sqlite:///{self.path}")
        self.model = {}
        self.submit({job_id: (number, priorities[number]) for number, job_id in enumerate("ab")})

    def teardown(self):
        with self.directory, contextlib.closing(self.store):
            self.check_events()

    def sql(self, statement, *values):
        with contextlib.closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(statement, values)

    def holders(self, destination):
        return {name for name, job in self.model.items() if job.destination == destination and job.state in LIVE_STATES}

    def anything_held(self):
        return any(job.is_held for job in self.model.values())

    # One rule with a weighted choice inside: among many rules, most of which rarely apply, little would happen.

    @rule(data=st.data())
    def something_happens(self, data):
        idle = [self.claim, self.claim, self.claim, self.submit_some, self.cancel, self.retry, self.wait_for_retries]
        busy = [self.advance, self.advance, self.end_the_attempt, self.end_the_attempt, self.lose_a_driver]
        always = [self.write_without_the_lease, self.extend_and_ask]
        data.draw(st.sampled_from(idle + always + (busy if self.anything_held() else [])))(data)

    # People.

    def submit_some(self, data):
        places = st.tuples(st.integers(0, 2), st.integers(0, 1))
        self.submit(data.draw(st.dictionaries(st.sampled_from(IDS), places, min_size=1, max_size=3)))

    def submit(self, wanted):
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
                self.store.submit(requests)
            return
        assert self.store.submit(requests).created == tuple(new)
        for job_id, (destination, priority) in new.items():
            self.model[job_id] = Job(len(self.model), destination, priority)

    def cancel(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        job = self.model[job_id]
        changes = job.state in CLAIMABLE_STATES or job.state in ACTIVE_STATES - {JobState.CANCELLING}
        assert self.store.cancel([job_id]) == ((job_id,) if changes else ())
        if job.state in CLAIMABLE_STATES:
            job.state, job.waits = JobState.CANCELLED, False
        elif job.state in ACTIVE_STATES:
            job.state = JobState.CANCELLING
        self.bury()

    def retry(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        job = self.model[job_id]
        if job.state in RETRYABLE_STATES and self.holders(job.destination) - {job_id}:
            with pytest.raises(BadInputError):
                self.store.retry([job_id])
            return
        assert self.store.retry([job_id]) == ((job_id,) if job.state in RETRYABLE_STATES else ())
        if job.state in RETRYABLE_STATES:
            job.state, job.attempts, job.waits = JobState.QUEUED, 0, False

    # Time.

    def lose_a_driver(self, data):
        job_id = self.draw_held(data)
        self.sql("UPDATE jobs SET lease_expires_at = 1 WHERE id = ?", job_id)
        self.model[job_id].expired = True

    def wait_for_retries(self, _data):
        self.sql("UPDATE jobs SET not_before = 1 WHERE not_before IS NOT NULL")
        for job in self.model.values():
            job.waits = False

    # Drivers.

    def bury(self):
        for job in self.model.values():
            if job.state is JobState.CANCELLING and job.expired:
                job.state, job.expired = JobState.CANCELLED, False

    def claim(self, data):
        owner = data.draw(st.sampled_from(["driver-1", "driver-2"]))
        limit = data.draw(st.integers(1, 3))
        self.bury()
        due = [
            (-job.priority, job.number, job_id)
            for job_id, job in self.model.items()
            if (job.state in CLAIMABLE_STATES and not job.waits) or (job.state in ACTIVE_STATES and job.expired)
        ]
        expected = [job_id for *_, job_id in sorted(due)[:limit]]
        leases = self.store.claim(owner, limit, 3600)
        assert [lease.job_id for lease in leases] == expected
        for lease in leases:
            job = self.model[lease.job_id]
            assert lease.token == job.token + 1
            assert lease.attempts == job.attempts + (not job.expired)
            job.state, job.token, job.attempts, job.expired = JobState.LEASED, lease.token, lease.attempts, False
            job.tokens.append(lease.token)
            job.owner = owner

    def draw_held(self, data):
        """Draw a job whose lease holds."""
        return data.draw(st.sampled_from(sorted(name for name, job in self.model.items() if job.is_held)))

    def advance(self, data):
        job_id = self.draw_held(data)
        job = self.model[job_id]
        state = data.draw(st.sampled_from(STAGES))
        errors = self.store.advance({job_id: job.token}, state)
        if job.state is JobState.CANCELLING:
            assert isinstance(errors.pop(job_id), CancelledError)
        elif job.state is JobState.LEASED or STAGES.index(job.state) < STAGES.index(state):
            job.state = state
        assert errors == {}

    def end_the_attempt(self, data):
        ending = data.draw(st.sampled_from(ENDINGS))
        job_id = self.draw_held(data)
        job = self.model[job_id]
        if ending is JobState.PUBLISHED:
            settle(self.store, job_id, job.token, a_release(job_id), None)
            job.state, job.was_published = ending, True
            return
        if ending is JobState.QUEUED:
            self.store.let_go(job_id, job.token, "drain")
            job.attempts -= 1
        else:
            decision = Decision(state=ending, delay_seconds=3600)
            self.store.fail(job_id, job.token, FailureClass.TRANSIENT_IO, "gone", decision)
        job.state = JobState.CANCELLED if job.state is JobState.CANCELLING else ending
        job.waits = job.state is JobState.RETRY_WAIT

    def extend_and_ask(self, _data):
        leases = {job_id: job.token for job_id, job in self.model.items()}
        held = {job_id for job_id, job in self.model.items() if job.is_held}
        for owner in ("driver-1", "driver-2"):
            own = {job_id for job_id in held if self.model[job_id].owner == owner}
            assert self.store.extend(owner, leases, 3600) == leases.keys() - own
            stale = {job_id: token - 1 for job_id, token in leases.items()}
            assert self.store.extend(owner, stale, 3600) == leases.keys()
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
            lambda: advance(self.store, job_id, token, JobState.PLANNING),
            lambda: settle(self.store, job_id, token, a_release(job_id), None),
            lambda: self.store.fail(job_id, token, FailureClass.INTERNAL, "x", Decision(state=JobState.FAILED)),
            lambda: self.store.let_go(job_id, token, "x"),
        ):
            with pytest.raises(LeaseLostError):
                write()

    # What always holds.

    @invariant()
    def the_store_is_as_the_model(self):
        records = self.store.jobs()
        assert {record.id for record in records} == self.model.keys()
        for record in records:
            job = self.model[record.id]
            assert (record.state, record.token, record.attempts) == (job.state, job.token, job.attempts)
            assert (record.owner is not None) == (record.state in ACTIVE_STATES)
            assert (record.release is not None) == (record.state is JobState.PUBLISHED)
            assert (record.not_before is not None) == (record.state is JobState.RETRY_WAIT)
        found = {state: count for state, count in self.store.counts().items() if count}
        assert found == Counter(job.state for job in self.model.values())

    def check_events(self):
        """Compare the log, which only grows, with what the model saw."""
        for job_id, job in self.model.items():
            events = self.store.events(job_id)
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            steps = [event.state for event in events]
            assert steps[0] is JobState.QUEUED
            assert steps[-1] is job.state
            assert all(after in TRANSITIONS[before] for before, after in itertools.pairwise(steps))
            tokens = [event.detail["token"] for event in events if event.state is JobState.LEASED]
            assert tokens == job.tokens == sorted(set(tokens))

    @invariant()
    def published_is_final_and_a_destination_has_one_job(self):
        assert all(job.state is JobState.PUBLISHED for job in self.model.values() if job.was_published)
        live = Counter(job.destination for job in self.model.values() if job.state in LIVE_STATES)
        assert all(count == 1 for count in live.values())

    @invariant()
    def it_knows_when_something_is_due(self):
        seconds = self.store.seconds_until_due()
        open_jobs = [job for job in self.model.values() if job.state not in FINAL_STATES]
        if not open_jobs:
            assert seconds is None
        elif any(job.expired or (job.state in CLAIMABLE_STATES and not job.waits) for job in open_jobs):
            assert seconds == 0
        else:
            assert 0 < seconds <= 3600


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
