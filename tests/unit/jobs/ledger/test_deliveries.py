"""Messages of the ledger: written with what they tell, kept until they are delivered."""

import json

import pytest
from sqlalchemy import select

from jobs.errors import FailureClass
from jobs.ledger.deliveries import MessageKind
from jobs.ledger.pauses import Scope
from jobs.ledger.schema import deliveries
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import Decision, JobState

ALL = frozenset(MessageKind)
FAILED = Decision(state=JobState.FAILED)


@pytest.fixture
def store(store_url):
    store = JobStore(store_url)
    yield store
    store.close()


def submit(store, *names):
    fields = {"base": "/b", "adapter": "/a"}
    requests = [MergeRequest.model_validate({"id": each, "destination": f"/out/{each}", **fields}) for each in names]
    store.submit(requests, "nightly")


def taken(store, webhook="ci", limit=99):
    return store.take_deliveries(webhook, limit, 60)


def rows(store):
    with store._database.read() as connection:
        return connection.execute(select(deliveries).order_by(deliveries.c.number)).all()


def test_what_ends_is_told_to_those_who_asked(store):
    store.subscribe({"ci": ALL, "failures": {MessageKind.JOB_FAILED}})
    submit(store, "one", "two")
    assert rows(store) == []
    [lease] = store.claim("driver", 1, 60)
    store.fail("one", lease.token, FailureClass.AUTH, "no", FAILED)
    store.cancel(["two"])
    first, second = taken(store)
    assert first.message_id != second.message_id
    body = json.loads(first.body)
    assert body["type"] == "job.failed"
    assert body["data"] == {
        "job": "one",
        "batch": "nightly",
        "state": "FAILED",
        "sequence": 3,
        "base": "/b",
        "destination": "/out/one",
        "detail": {"failure": "auth", "message": "no", "attempt": 0, "worker_lost": False},
    }
    assert json.loads(second.body)["type"] == "job.cancelled"
    [same] = taken(store, "failures")
    assert (same.message_id, same.body) == (first.message_id, first.body)


def test_places_that_rest_are_told_once_and_when_they_work_again(store):
    store.subscribe({"ci": ALL})
    submit(store, "one")
    store.pause(Scope.QUEUE, "", "ann", "")
    store.resume(Scope.QUEUE, "")
    store.pause(Scope.PLACE, "s3://out", "ann", "moving")
    fault = {"by": "driver", "failure": FailureClass.TRANSIENT_IO, "reason": "away", "state": JobState.PLANNING}
    for _ in range(2):
        store.pause_place("hf://", "one", **fault, first_seconds=0, max_seconds=0)
    store.resume(Scope.PLACE, "hf://")
    found = [(body["type"], body["data"]["place"]) for body in (json.loads(each.body) for each in taken(store))]
    assert found == [("place.paused", "s3://out"), ("place.paused", "hf://"), ("place.resumed", "hf://")]


def test_a_message_is_written_with_its_event_or_not_at_all(store, monkeypatch):
    store.subscribe({"ci": ALL})
    submit(store, "one")

    def fail(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("jobs.ledger.journal.tell", fail)
        with pytest.raises(ZeroDivisionError):
            store.cancel(["one"])
    assert store.jobs()[0].state is JobState.QUEUED
    assert rows(store) == []


def test_one_that_is_taken_is_no_one_elses_until_its_lease_ends(store):
    store.subscribe({"ci": ALL})
    submit(store, "one")
    store.cancel(["one"])
    [delivery] = store.take_deliveries("ci", 9, 0)
    [again] = taken(store)
    assert again == delivery
    assert taken(store) == ()
    store.delivered(delivery.number)
    assert store.take_deliveries("ci", 9, 0) == ()
    assert [each.num_waiting for each in store.webhooks()] == [0]


def test_one_that_fails_comes_again_and_one_that_is_given_up_does_not(store):
    store.subscribe({"ci": ALL})
    submit(store, "one", "two")
    store.cancel(["one", "two"])
    first, second = taken(store)
    store.not_delivered(first.number, "status 500", 0)
    store.give_up(second.number, "status 410")
    [again] = taken(store)
    assert (again.message_id, again.num_tries) == (first.message_id, 1)
    [record] = store.webhooks()
    assert (record.name, record.num_waiting, record.num_given_up, record.last_failure) == ("ci", 1, 1, "status 500")


def test_one_who_is_gone_is_told_nothing_and_one_who_comes_only_what_follows(store):
    store.subscribe({"ci": ALL})
    submit(store, "one", "two")
    store.cancel(["one"])
    store.subscribe({"other": ALL})
    assert rows(store) == []
    store.cancel(["two"])
    assert [each.webhook for each in rows(store)] == ["other"]
    store.subscribe({"other": ALL})
    assert len(rows(store)) == 1


def test_what_was_delivered_long_ago_is_purged(store):
    store.subscribe({"ci": ALL})
    submit(store, "one", "two")
    store.cancel(["one", "two"])
    store.delivered(taken(store, limit=1)[0].number)
    store.purge(0)
    assert len(rows(store)) == 1
