"""States of a job, and their transitions."""

import pytest

from jobs.states import (
    ACTIVE_STATES,
    CLAIMABLE_STATES,
    FINAL_STATES,
    LIVE_STATES,
    RETRYABLE_STATES,
    TRANSITIONS,
    WAITING_STATES,
    JobState,
)


def reachable(start):
    seen, todo = set(), [start]
    while todo:
        for state in TRANSITIONS[todo.pop()] - seen:
            seen.add(state)
            todo.append(state)
    return seen


def test_the_kinds_of_states_cover_all_of_them_once():
    assert set(JobState) == ACTIVE_STATES | WAITING_STATES | FINAL_STATES
    assert len(ACTIVE_STATES) + len(WAITING_STATES) + len(FINAL_STATES) == len(JobState)
    assert {JobState.AWAITING_APPROVAL} == WAITING_STATES - CLAIMABLE_STATES


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


@pytest.mark.parametrize("state", sorted(CLAIMABLE_STATES))
def test_what_waits_may_pass_its_deadline(state):
    assert JobState.FAILED in TRANSITIONS[state]


@pytest.mark.parametrize("state", sorted(RETRYABLE_STATES))
def test_a_retry_leads_to_the_queue(state):
    assert JobState.QUEUED in TRANSITIONS[state]


def test_a_destination_is_held_until_the_job_is_given_up():
    assert set(JobState) - LIVE_STATES == FINAL_STATES - {JobState.PUBLISHED}
