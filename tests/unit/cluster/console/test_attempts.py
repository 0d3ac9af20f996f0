"""Attempts and times of places at fault, read from events as the ledger writes them."""

import pytest

from cluster.console.attempts import Outcome, attempts_of, bands_of
from jobs.errors import FailureClass
from jobs.states import JobState
from tests.nights import BUCKET, Night


@pytest.fixture
def night(tmp_path):
    it = Night(tmp_path, num_workers=1)
    yield it
    it.store.close()


def bands(night, paused=()):
    return bands_of([(each.request, night.store.events(each.id)) for each in night.store.jobs()], paused, night.now)


def at_fault(night, *, after):
    """Let one job meet a fault of its bucket after so many seconds; return when it began, and the time now."""
    begun = night.now
    worker, leases = night.pass_of(1)
    night.now = begun + after
    night.meet_fault(leases[0], JobState.PLANNING)
    night.free_at[worker] = night.now
    return begun


def test_attempts_are_from_their_begin_to_what_ended_them(night):
    night.submit(1)
    began = night.now
    worker, (lease,) = night.pass_of()
    night.work(worker, (lease,), 10.0)
    night.fail(lease, FailureClass.OUT_OF_MEMORY, "memory ran out", again=True)
    night.now = began + 20.0
    worker, leases = night.pass_of()
    night.work(worker, leases, 10.0)
    night.publish(leases, 10.0)
    events = night.store.events("job-00000")
    first, second = attempts_of(events, night.now)
    assert (first.begin, first.end, first.outcome, first.worker) == (
        began,
        began + 9.5,
        Outcome.AGAIN,
        "merge-worker-0",
    )
    assert first.words == "out_of_memory: memory ran out"
    assert (second.begin - began, second.end - began, second.outcome) == (20.0, 30.0, Outcome.PUBLISHED)
    (at_work,) = attempts_of([event for event in events if event.at < began + 9.0], began + 9.0)
    assert (at_work.outcome, at_work.end) == (Outcome.AT_WORK, began + 9.0)


def test_what_a_place_ended_is_not_charged(night):
    night.submit(1)
    at_fault(night, after=3.0)
    (attempt,) = attempts_of(night.store.events("job-00000"), night.now)
    assert attempt.outcome is Outcome.GIVEN_BACK
    assert BUCKET in attempt.words


def test_a_place_is_at_fault_until_the_job_sent_ahead_gets_past_it(night):
    night.submit(2)
    began = at_fault(night, after=3.0)
    (open_band,) = bands(night, [BUCKET])
    assert (open_band.begin - began, open_band.end - began) == (3.0, 3.0)
    night.now = began + 63.0
    worker, leases = night.pass_of()
    assert [each.is_probe for each in leases] == [True]
    (claimed,) = [each for each in night.store.events(leases[0].job_id) if each.state is JobState.LEASED]
    assert claimed.detail["tries"] == [BUCKET]
    night.now = began + 70.0
    night.meet_fault(leases[0], JobState.PLANNING)
    night.now = began + 191.0
    worker, leases = night.pass_of()
    assert [each.is_probe for each in leases] == [True]
    night.work(worker, leases, 100.0)  # MERGING after ten seconds
    night.store.passed(leases[0].job_id, JobState.MERGING)
    (band,) = bands(night)
    assert (band.place, band.begin - began, band.end - began) == (BUCKET, 3.0, 201.0)
    assert band.job_ids == ("job-00000", "job-00001")
    assert "does not answer" in band.words


def test_a_person_who_resumes_a_place_ends_its_time(night):
    night.submit(1)
    began = at_fault(night, after=3.0)
    night.store.resume("place", BUCKET)
    night.now = began + 13.0
    night.pass_of()
    (band,) = bands(night)
    assert (band.begin - began, band.end - began) == (3.0, 13.0)


def test_two_faults_with_work_between_are_two_times(night):
    night.submit(2)
    began = at_fault(night, after=1.0)
    night.store.resume("place", BUCKET)
    night.now = began + 5.0
    at_fault(night, after=2.0)
    assert [(each.begin - began, each.end - began) for each in bands(night, [BUCKET])] == [(1.0, 5.0), (7.0, 7.0)]
