"""A clock that steps back by an hour: nothing is kept for an hour by what was written before."""

import pytest

from jobs.errors import FailureClass
from jobs.ledger.store import JobStore
from jobs.states import Decision, JobState

HOUR = 3600.0


class Clock:
    """Seconds that a test sets."""

    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stepped(store_url, clock):
    it = JobStore(store_url, clock)
    it.register_driver("driver", "host", 1, "")
    yield it
    it.close()


def claimed(store, owner="driver"):
    return [lease.job_id for lease in store.claim(owner, 9, 30)]


@pytest.mark.parametrize("step", [HOUR, 60.0])
def test_the_lease_of_a_dead_driver_runs_out_in_time(stepped, clock, make_request, step):
    stepped.submit([make_request("a")])
    assert claimed(stepped) == ["a"]
    clock.now -= step
    assert claimed(stepped, "next") == []
    clock.now += 29
    assert claimed(stepped, "next") == []
    clock.now += 2
    assert claimed(stepped, "next") == ["a"]


def test_a_job_that_waits_is_due_in_time(stepped, clock, make_request):
    stepped.submit([make_request("a")])
    (lease,) = stepped.claim("driver", 1, 30)
    decision = Decision(state=JobState.RETRY_WAIT, delay_seconds=20)
    stepped.fail("a", lease.token, FailureClass.OUT_OF_MEMORY, "full", decision)
    clock.now -= HOUR
    assert claimed(stepped) == []
    assert stepped.seconds_until_due() == 20
    clock.now += 21
    assert claimed(stepped) == ["a"]


def test_a_place_is_tried_in_time(stepped, clock, make_request):
    stepped.submit([make_request("a", destination="s3://bucket/a")])
    (lease,) = stepped.claim("driver", 1, 30)
    stepped.pause_place(
        "s3://bucket",
        "a",
        by="driver",
        failure=FailureClass.TRANSIENT_IO,
        reason="gone",
        state=JobState.PLANNING,
        first_seconds=20,
        max_seconds=20,
    )
    stepped.let_go("a", lease.token, "gone")
    clock.now -= HOUR
    assert claimed(stepped) == []
    clock.now += 21
    assert claimed(stepped) == ["a"]


def test_a_correction_of_seconds_changes_nothing(stepped, clock, make_request):
    stepped.submit([make_request("a")])
    claimed(stepped)
    clock.now -= 4
    assert claimed(stepped, "next") == []
    clock.now += 33
    assert claimed(stepped, "next") == []
    clock.now += 2
    assert claimed(stepped, "next") == ["a"]


def test_a_live_driver_keeps_its_lease(stepped, clock, make_request):
    stepped.submit([make_request("a")])
    (lease,) = stepped.claim("driver", 1, 30)
    clock.now -= HOUR
    stepped.claim("other", 1, 30)
    assert stepped.extend("driver", {"a": lease.token}, 30) == frozenset()
    clock.now += 29
    assert claimed(stepped, "other") == []
