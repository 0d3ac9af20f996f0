"""States of a job, their transitions, and the policy of retries."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import FailureClass
from jobs.states import (
    ACTIVE_STATES,
    CLAIMABLE_STATES,
    FINAL_STATES,
    LIVE_STATES,
    RETRYABLE_STATES,
    TRANSITIONS,
    JobState,
    RetryPolicy,
)


def reachable(start):
    seen, todo = set(), [start]
    while todo:
        for state in TRANSITIONS[todo.pop()] - seen:
            seen.add(state)
            todo.append(state)
    return seen


def test_the_kinds_of_states_cover_all_of_them_once():
    assert set(JobState) == ACTIVE_STATES | CLAIMABLE_STATES | FINAL_STATES
    assert len(ACTIVE_STATES) + len(CLAIMABLE_STATES) + len(FINAL_STATES) == len(JobState)


def test_every_state_has_its_transitions_and_can_be_reached():
    assert set(TRANSITIONS) == set(JobState)
    assert reachable(JobState.QUEUED) == set(JobState)


def test_published_is_final():
    assert TRANSITIONS[JobState.PUBLISHED] == frozenset()


def test_final_states_lead_back_to_the_queue_only():
    for state in FINAL_STATES - {JobState.PUBLISHED}:
        assert TRANSITIONS[state] == {JobState.QUEUED}


@pytest.mark.parametrize("state", sorted(ACTIVE_STATES))
def test_whatever_a_driver_does_when_it_dies_the_job_can_go_on(state):
    way_out = JobState.CANCELLED if state is JobState.CANCELLING else JobState.QUEUED
    assert way_out in TRANSITIONS[state]


@pytest.mark.parametrize("state", sorted(RETRYABLE_STATES))
def test_a_retry_leads_to_the_queue(state):
    assert JobState.QUEUED in TRANSITIONS[state]


def test_a_destination_is_held_until_the_job_is_given_up():
    assert set(JobState) - LIVE_STATES == FINAL_STATES - {JobState.PUBLISHED}


failures = st.sampled_from(sorted(set(FailureClass) - {FailureClass.CANCELLED}))


@given(failures, st.integers(1, 20), st.integers(0, 5), st.integers())
def test_every_decision_is_an_allowed_transition_with_a_bounded_delay(failure, attempts, losses, seed):
    policy = RetryPolicy()
    decision = policy.decide(failure, attempts=attempts, worker_losses=losses, rng=random.Random(seed))
    assert decision.state in TRANSITIONS[JobState.MERGING]
    assert 0 <= decision.delay_seconds <= policy.max_delay_seconds
    assert (decision.delay_seconds == 0) or decision.state is JobState.RETRY_WAIT


@pytest.mark.parametrize(
    ("failure", "attempts", "losses", "state"),
    [
        (FailureClass.BAD_INPUT, 1, 0, JobState.FAILED),
        (FailureClass.TRANSIENT_IO, 1, 0, JobState.RETRY_WAIT),
        (FailureClass.TRANSIENT_IO, 5, 0, JobState.FAILED),
        (FailureClass.OUT_OF_MEMORY, 4, 0, JobState.RETRY_WAIT),
        (FailureClass.OUT_OF_MEMORY, 5, 0, JobState.FAILED),
        (FailureClass.WORKER_LOST, 1, 1, JobState.RETRY_WAIT),
        (FailureClass.WORKER_LOST, 2, 2, JobState.QUARANTINED),
        (FailureClass.WORKER_LOST, 3, 3, JobState.QUARANTINED),
        (FailureClass.CANCELLED, 1, 0, JobState.CANCELLED),
    ],
)
def test_decisions(failure, attempts, losses, state):
    decision = RetryPolicy().decide(failure, attempts=attempts, worker_losses=losses, rng=random.Random(0))
    assert decision.state is state
