"""Messages to a real receiver: one that is away, one that refuses, and a sender that is killed in between."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cluster.front.sender import Sender
from cluster.setting_types import Webhook
from jobs.ledger.deliveries import MessageKind
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from tests.servers.receiver import SECRET, receive

SERVE = """
import sys
import cluster.front.sender
from cluster.cli import main
cluster.front.sender._LEASE_SECONDS = 2.0
sys.argv = ["mergefleet", "serve", "--port", "0", "--json"]
main()
"""


@pytest.fixture
def store(store_url):
    store = JobStore(store_url)
    yield store
    store.close()


def webhook(url, **fields):
    return Webhook.model_validate({"url": url, "secret": SECRET, **fields})


@contextlib.contextmanager
def sending(store, **webhooks):
    sender = Sender(store, webhooks)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


def end_jobs(store, *names):
    fields = {"base": "/b", "adapter": "/a"}
    store.submit([MergeRequest.model_validate({"id": each, "destination": f"/o/{each}", **fields}) for each in names])
    store.cancel(names)


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def jobs_of(receiver):
    return [body["data"]["job"] for _, body in receiver.messages]


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_receiver_that_is_away_gets_each_event_once_when_it_is_back(store, seconds):
    with receive() as first:
        port = first.port
        with sending(store, ci=webhook(first.url)):
            end_jobs(store, "before")
            wait_for(lambda: jobs_of(first) == ["before"])
            first.close()
            names = [f"job-{number}" for number in range(20)]
            end_jobs(store, *names)
            time.sleep(seconds)
            assert store.webhooks()[0].num_waiting == 20
            with receive(port) as second:
                wait_for(lambda: store.webhooks()[0].num_waiting == 0, 2 * seconds + 30)
                assert sorted(jobs_of(second)) == sorted(names)
                assert len({id_ for id_, _ in second.messages}) == 20
                assert second.num_requests == 20


def test_a_receiver_that_refuses_at_first_gets_the_same_id_again(store):
    ids = []
    with receive(answer=lambda number: 500 if number < 3 else 204) as receiver:
        with sending(store, ci=webhook(receiver.url)):
            end_jobs(store, "one")
            wait_for(lambda: receiver.messages)
            wait_for(lambda: store.webhooks()[0].num_waiting == 0)
        ids = [id_ for id_, _ in receiver.messages]
        assert receiver.num_requests == 3
    assert len(ids) == 1


def test_one_that_is_away_keeps_no_other_waiting(store):
    with receive() as receiver:
        kinds = [MessageKind.JOB_CANCELLED]
        with sending(store, away=webhook("http://127.0.0.1:9/"), here=webhook(receiver.url, kinds=kinds)):
            end_jobs(store, "one", "two")
            wait_for(lambda: jobs_of(receiver) == ["one", "two"])
            wait_for(lambda: store.webhooks()[0].last_failure is not None)
    assert [(each.name, each.num_waiting) for each in store.webhooks()] == [("away", 2), ("here", 0)]


def test_a_server_that_is_killed_after_the_receiver_has_a_message_sends_it_again_under_its_id(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path}/mergefleet.db")
    came, go_on = threading.Event(), threading.Event()

    def answer(number):
        if number == 2:
            came.set()
            go_on.wait(60)
        return 204

    with receive(answer=answer) as receiver:
        hooks = json.dumps({"ci": {"url": receiver.url, "secret": SECRET}})
        values = {name: value for name, value in os.environ.items() if not name.startswith("MERGEFLEET_")}
        values |= {"MERGEFLEET_HOME": str(tmp_path), "MERGEFLEET_WEBHOOKS": hooks}

        @contextlib.contextmanager
        def start():
            with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, env=values) as process:
                try:
                    assert process.stdout.readline()
                    yield process
                    process.wait(60)
                finally:
                    process.kill()

        with start() as first:
            end_jobs(store, "one", "two", "three")
            assert came.wait(60)
            first.kill()
        go_on.set()
        wait_for(lambda: len(receiver.messages) >= 2)
        with start() as second:
            wait_for(lambda: store.webhooks()[0].num_waiting == 0)
            second.send_signal(signal.SIGTERM)
        assert second.returncode == 0
    by_id = {id_: body["data"]["job"] for id_, body in receiver.messages}
    assert sorted(by_id.values()) == ["one", "three", "two"]
    assert len(receiver.messages) == 4
    store.close()
