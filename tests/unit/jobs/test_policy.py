"""What follows failures of each class, and what an operator may set apart."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.errors import FailureClass
from jobs.policy import failure_policy
from jobs.states import TRANSITIONS, JobState

failures = st.sampled_from(sorted(set(FailureClass) - {FailureClass.CANCELLED}))


@given(failures, st.integers(1, 2000), st.integers(0, 5), st.integers())
def test_every_decision_is_an_allowed_transition_with_a_bounded_delay(failure, attempts, losses, seed):
    policy = failure_policy()
    decision = policy.decide(failure, attempts=attempts, worker_losses=losses, rng=random.Random(seed))
    assert decision.state in TRANSITIONS[JobState.MERGING]
    assert 0 <= decision.delay_seconds <= min(300, 2.0 * 2 ** min(attempts - 1, 99))
    assert (decision.delay_seconds == 0) or decision.state is JobState.RETRY_WAIT


@pytest.mark.parametrize(
    ("failure", "attempts", "losses", "state"),
    [
        (FailureClass.BAD_INPUT, 1, 0, JobState.FAILED),
        (FailureClass.AUTH, 1, 0, JobState.FAILED),
        (FailureClass.PARITY_FAILED, 1, 0, JobState.FAILED),
        (FailureClass.INTERNAL, 1, 0, JobState.FAILED),
        (FailureClass.TIMED_OUT, 1, 0, JobState.FAILED),
        (FailureClass.TRANSIENT_IO, 1, 0, JobState.RETRY_WAIT),
        (FailureClass.TRANSIENT_IO, 4, 0, JobState.RETRY_WAIT),
        (FailureClass.TRANSIENT_IO, 5, 0, JobState.FAILED),
        (FailureClass.NO_CAPACITY, 4, 0, JobState.RETRY_WAIT),
        (FailureClass.NO_CAPACITY, 5, 0, JobState.FAILED),
        (FailureClass.OUT_OF_MEMORY, 4, 0, JobState.RETRY_WAIT),
        (FailureClass.OUT_OF_MEMORY, 5, 0, JobState.FAILED),
        (FailureClass.WORKER_LOST, 1, 1, JobState.RETRY_WAIT),
        (FailureClass.WORKER_LOST, 9, 1, JobState.RETRY_WAIT),
        (FailureClass.WORKER_LOST, 2, 2, JobState.QUARANTINED),
        (FailureClass.WORKER_LOST, 3, 3, JobState.QUARANTINED),
        (FailureClass.CANCELLED, 1, 0, JobState.CANCELLED),
    ],
)
def test_decisions(failure, attempts, losses, state):
    decision = failure_policy().decide(failure, attempts=attempts, worker_losses=losses, rng=random.Random(0))
    assert decision.state is state
    assert decision.alone == (failure in {FailureClass.OUT_OF_MEMORY, FailureClass.WORKER_LOST, FailureClass.INTERNAL})


def test_what_rests_a_place():
    policy = failure_policy()
    assert {failure for failure in FailureClass if policy[failure].pauses_place} == {
        FailureClass.TRANSIENT_IO,
        FailureClass.NO_CAPACITY,
        FailureClass.AUTH,
    }


def test_waits_double_up_to_the_longest():
    policy = failure_policy(delay_seconds=2, max_delay_seconds=20)[FailureClass.TRANSIENT_IO]
    assert [policy.longest_wait(number) for number in (1, 2, 3, 4, 5, 6, 10_000)] == [2, 4, 8, 16, 20, 20, 20]


def test_jitter_is_full():
    policy = failure_policy(delay_seconds=100)
    rng = random.Random(1)
    delays = [
        policy.decide(FailureClass.TRANSIENT_IO, attempts=1, worker_losses=0, rng=rng).delay_seconds for _ in range(300)
    ]
    assert 0 <= min(delays) < 5
    assert 95 < max(delays) <= 100


def test_an_operator_sets_fields_of_a_class_apart_and_no_others():
    policy = failure_policy(
        max_attempts=7,
        overrides={FailureClass.TRANSIENT_IO: {"attempts": 2}, FailureClass.AUTH: {"pauses_place": False}},
    )
    usual = failure_policy(max_attempts=7)
    changed = {failure for failure in FailureClass if policy[failure] != usual[failure]}
    assert changed == {FailureClass.TRANSIENT_IO, FailureClass.AUTH}
    assert policy[FailureClass.TRANSIENT_IO] == usual[FailureClass.TRANSIENT_IO].model_copy(update={"attempts": 2})
    assert policy[FailureClass.NO_CAPACITY].attempts == 7


@pytest.mark.parametrize("fields", [{"attempts": 0}, {"delay_seconds": -1}, {"attemps": 3}, {"attempts": "many"}])
def test_what_is_no_policy_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        failure_policy(overrides={FailureClass.AUTH: fields})
