"""Several processes on one store, and processes that die with SIGKILL in the middle of their work."""

import itertools
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jobs.errors import BadInputError, NotFoundError
from jobs.ledger.store import JobStore
from jobs.states import ACTIVE_STATES, TRANSITIONS, JobState
from tests.unit.jobs.ledger.conftest import raw

SCRIPT = Path(__file__).with_name("store_process.py")


@pytest.fixture
def start(store_url):
    """Start processes on the store that have loaded everything and wait for the word to begin."""
    started = []

    def start(command, name):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, command, store_url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def begin(processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def said(process, word, kill_after=None):
    """Return the jobs of the lines that begin with a word, once the process has ended by itself or been killed."""
    try:
        output, _ = process.communicate(timeout=kill_after or 120)
        assert process.returncode == 0
    except subprocess.TimeoutExpired:
        assert kill_after is not None
        process.kill()
        output, _ = process.communicate()
    lines = (line.split() for line in output.splitlines(keepends=True) if line.endswith("\n"))
    return [job_id for first, job_id in lines if first == word]


@pytest.fixture
def store_url(new_url):
    """Not there yet: these processes are what makes it."""
    return new_url


def test_four_processes_claim_200_jobs_each_once(store, start, make_request):
    store.submit([make_request(f"r{index}") for index in range(200)])
    processes = [start("claim_all", f"driver-{index}") for index in range(4)]
    begin(processes)
    claimed = Counter(job_id for process in processes for job_id in said(process, "claimed"))
    assert claimed == {f"r{index}": 1 for index in range(200)}
    assert {job.token for job in store.jobs()} == {1}


def test_processes_that_open_a_new_store_at_once_all_succeed(store_url, start):
    processes = [start("submit", f"person-{index}") for index in range(4)]
    with pytest.raises((BadInputError, NotFoundError), match="no ledger"):
        JobStore(store_url, create=False)
    begin(processes)
    created = Counter(job_id for process in processes for job_id in said(process, "created"))
    assert created == {f"r{index}": 1 for index in range(40)}


def test_drivers_killed_at_any_moment_lose_nothing(store, store_url, start, make_request):
    """What a driver said it settled stays settled, the rest is done by the next one, and nothing is done twice."""
    names = {f"r{index}" for index in range(60)}
    store.submit([make_request(name) for name in sorted(names)])
    rng = random.Random(0)
    settled = []
    num_kills, was_held = 0, False
    while num_kills < 3 or not was_held:  # on a busy machine a driver may have claimed nothing yet
        assert num_kills < 30
        process = start("work", f"driver-{num_kills}")
        begin([process])
        settled += said(process, "settled", kill_after=rng.uniform(0.1, 0.4))
        num_kills += 1
        was_held = was_held or any(job.state in ACTIVE_STATES for job in store.jobs())
    last = start("work", "driver-last")
    begin([last])
    settled += said(last, "settled")

    assert len(settled) == len(set(settled))
    assert len(names - set(settled)) <= num_kills, "only a settlement that was killed before it was told is missing"
    assert store.counts() == dict.fromkeys(JobState, 0) | {JobState.PUBLISHED: len(names)}
    for job in store.jobs():
        events = store.events(job.id)
        states = [event.state for event in events]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert all(after in TRANSITIONS[before] for before, after in itertools.pairwise(states))
        assert states.count(JobState.PUBLISHED) == 1
        tokens = [event.detail["token"] for event in events if event.state is JobState.LEASED]
        assert tokens == list(range(1, job.token + 1))
        assert job.release.manifest.request_id == job.id
    assert any(event.detail.get("reason") == "lease expired" for name in names for event in store.events(name))
    assert store.pauses() == ()
    assert store.num_held() == {}
    if store_url.startswith("sqlite"):
        with raw(store_url) as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
