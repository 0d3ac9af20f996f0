"""Releases that wait for a person: asked for by drivers, answered by name, for what was proven and nothing else."""

import pytest
from sqlalchemy import update

from jobs.errors import BadInputError, InternalError, LeaseLostError, NotFoundError
from jobs.ledger.deliveries import MessageKind
from jobs.ledger.records import Approval
from jobs.ledger.schema import jobs
from jobs.states import JobState
from tests.releases import advance, begin, settle

KEY = "e" * 64


@pytest.fixture
def ask(store, driver, make_request):
    """Bring a job of this name to where a person is asked."""

    def ask(name):
        store.submit([make_request(name)])
        token = driver.claim(name).token
        begin(store, name, token)
        advance(store, name, token, JobState.VERIFYING)
        return store.await_approval(name, token, KEY, f"/reports/{name}", {"unit": 1})

    return ask


def test_a_job_waits_without_a_lease_and_is_never_due(store, driver, ask):
    assert ask("a") is JobState.AWAITING_APPROVAL
    job = driver.record("a")
    assert (job.state, job.owner, job.merge_key, job.report_path) == (
        JobState.AWAITING_APPROVAL,
        None,
        KEY,
        "/reports/a",
    )
    assert (job.attempts, job.approval) == (0, None)
    assert store.claim("driver", 1, 60) == ()
    assert store.seconds_until_due() is None
    assert store.events("a")[-1].detail == {"merge_key": KEY, "unit": 1}
    assert store.retry(["a"]) == ()


def test_what_is_approved_goes_on_with_the_word_for_that_release(store, driver, ask, make_release):
    ask("a")
    assert store.approve(["a"], "ann") == ("a",)
    assert store.approve(["a"], "bob") == ()
    assert store.events("a")[-1].detail == {"approved_by": "ann"}
    lease = driver.claim("a")
    assert (lease.approval, lease.attempts) == (Approval(by="ann", merge_key=KEY), 1)
    begin(store, "a", lease.token)
    advance(store, "a", lease.token, JobState.PUBLISHING)
    settle(store, "a", lease.token, make_release("a"), None)
    assert driver.record("a").approval == Approval(by="ann", merge_key=KEY)


def test_a_release_that_is_another_is_asked_for_again(store, driver, ask):
    ask("a")
    store.approve(["a"], "ann")
    token = driver.claim("a").token
    begin(store, "a", token)
    advance(store, "a", token, JobState.VERIFYING)
    store.await_approval("a", token, "f" * 64, None, {})
    assert driver.record("a").approval is None
    store.approve(["a"], "bob")
    assert driver.claim("a").approval == Approval(by="bob", merge_key="f" * 64)


def test_what_is_rejected_is_cancelled_and_tried_again_only_without_a_word(store, driver, ask):
    ask("a")
    assert store.reject(["a"], "ann", "worse than the last one") == ("a",)
    assert driver.record("a").state is JobState.CANCELLED
    assert store.events("a")[-1].detail == {
        "rejected_by": "ann",
        "reason": "rejected by ann: worse than the last one",
    }
    store.retry(["a"])
    assert driver.claim("a").approval is None


def test_a_retry_takes_back_an_approval(store, driver, ask):
    ask("a")
    store.approve(["a"], "ann")
    store.cancel(["a"])
    store.retry(["a"])
    assert driver.claim("a").approval is None


def test_a_deadline_is_for_what_has_not_begun(store, driver, make_request):
    store.submit([make_request("a", deadline="2099-01-01T00:00:00Z")])
    token = driver.claim("a").token
    begin(store, "a", token)
    advance(store, "a", token, JobState.VERIFYING)
    store.await_approval("a", token, KEY, None, {})
    with store._database.write() as connection:
        connection.execute(update(jobs).values(deadline=1))
    assert store.claim("driver", 1, 60) == ()
    assert driver.record("a").state is JobState.AWAITING_APPROVAL
    store.approve(["a"], "ann")
    assert [lease.job_id for lease in store.claim("driver", 1, 60)] == ["a"]


def test_people_may_cancel_what_waits_for_their_word(store, driver, ask):
    ask("a")
    assert store.cancel(["a"]) == ("a",)
    assert driver.record("a").state is JobState.CANCELLED


def test_a_job_that_was_to_be_cancelled_is_not_asked_for(store, driver, make_request):
    store.submit([make_request("a")])
    token = driver.claim("a").token
    begin(store, "a", token)
    advance(store, "a", token, JobState.VERIFYING)
    store.cancel(["a"])
    assert store.await_approval("a", token, KEY, None, {}) is JobState.CANCELLED


def test_only_what_is_proven_and_held_can_be_asked_for(store, driver, make_request):
    store.submit([make_request("a")])
    token = driver.claim("a").token
    begin(store, "a", token)
    with pytest.raises(InternalError, match="no way leads from PLANNING to AWAITING_APPROVAL"):
        store.await_approval("a", token, KEY, None, {})
    with pytest.raises(LeaseLostError):
        store.await_approval("a", token - 1, KEY, None, {})


@pytest.mark.parametrize("by", ["", "  ", "a\0b", "two\nlines"])
def test_someone_has_to_be_named(store, driver, ask, by):
    ask("a")
    for answer in (lambda: store.approve(["a"], by), lambda: store.reject(["a"], by, "why")):
        with pytest.raises(BadInputError, match="name of the person"):
            answer()
    assert driver.record("a").state is JobState.AWAITING_APPROVAL


def test_unknown_ids_change_nothing(store, driver, ask):
    ask("a")
    with pytest.raises(NotFoundError, match="no job b"):
        store.approve(["a", "b"], "ann")
    assert driver.record("a").state is JobState.AWAITING_APPROVAL


def test_receivers_are_told_that_someone_is_asked(store, ask):
    store.subscribe({"ci": [MessageKind.JOB_AWAITING_APPROVAL]})
    ask("a")
    (delivery,) = store.take_deliveries("ci", 10, 60)
    assert '"state":"AWAITING_APPROVAL"' in delivery.body.replace(" ", "")
