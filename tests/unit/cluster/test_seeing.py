"""`mergefleet logs`, `status ID` and `purge` on files and a ledger as drivers leave them."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.log_reading import LogReader
from cluster.log_files import driver_log, worker_log
from cluster.settings import Settings
from jobs.errors import FailureClass
from jobs.ledger.pauses import Scope
from jobs.ledger.records import Beginning, Fault
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import Decision, JobState

HERE = socket.gethostname()
OWNER = f"{HERE}-1-aa"
WORKER = worker_log("merge-worker-0", HERE, OWNER)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MERGEFLEET_{name.upper()}", raising=False)
    monkeypatch.setenv("MERGEFLEET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MERGEFLEET_POLL_SECONDS", "0.1")
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path}/home/mergefleet.db")
    store.submit(
        [
            MergeRequest(id=name, base="/bases/a", adapter=f"/adapters/{name}", destination=f"s3://bucket/{name}")
            for name in ("one", "two")
        ],
        "nightly",
    )
    yield store
    store.close()


@pytest.fixture
def logs(tmp_path):
    directory = tmp_path / "home" / "logs"
    directory.mkdir(parents=True)
    return directory


def call(*arguments):
    return CliRunner().invoke(app, arguments)


def documents(*arguments):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def write(path, *lines):
    with path.open("a") as file:
        file.writelines(json.dumps({"level": "INFO", "logger": "workers", **line}) + "\n" for line in lines)


def begin(store, name="one", *, node=HERE, log=WORKER):
    leases = {each.job_id: each for each in store.claim(OWNER, 2, 60)}
    lease = leases[name]
    store.begin([Beginning(job_id=name, token=lease.token, worker="merge-worker-0", node=node, log=log)])
    return lease


def test_the_log_of_a_worker_is_named_where_its_work_begins(store):
    begin(store)
    assert store.events("one")[-1].detail == {
        "attempt": 1,
        "owner": OWNER,
        "worker": "merge-worker-0",
        "node": HERE,
        "log": WORKER,
    }


def test_the_lines_of_a_job_come_from_driver_and_workers_in_order_of_time(store, logs):
    begin(store)
    write(
        logs / driver_log(OWNER),
        {"at": 1.0, "message": "unit started", "job_ids": ["one", "two"]},
        {"at": 4.0, "message": "job settled", "job_id": "one"},
        {"at": 4.1, "message": "job settled", "job_id": "two"},
        {"at": 5.0, "message": "about one, which is no job here"},
    )
    write(logs / f"{WORKER}.1", {"at": 2.0, "message": "stage begun", "job_ids": ["one"]})
    write(
        logs / WORKER,
        {"at": 3.0, "message": "job failed", "job_id": "two", "job_ids": ["one", "two"]},
        {"at": 3.5, "message": "unit done", "job_ids": ["one", "two"], "unit": "merge:a"},
        {"at": 3.6, "message": "begun", "job_ids": ["one-2"]},
    )
    write(logs / driver_log("another-1-bb"), {"at": 2.5, "message": "unit started", "job_ids": ["one"]})
    with (logs / WORKER).open("a") as file:
        file.write('{"at": 3.7, "message": "torn", "job_ids": ["one"]')
    found = documents("logs", "one")
    assert [(line["at"], line["message"]) for line in found] == [
        (1.0, "unit started"),
        (2.0, "stage begun"),
        (3.5, "unit done"),
        (4.0, "job settled"),
    ]
    assert found[1]["file"] == f"{WORKER}.1"
    shown = call("logs", "one").stdout.splitlines()
    assert shown[0] == "1970-01-01 00:00:01.000  driver  INFO  unit started"
    assert shown[1].split()[2:] == ["merge-worker-0", "INFO", "stage", "begun"]


def test_text_from_outside_acts_on_no_terminal(store, logs):
    begin(store)
    write(logs / WORKER, {"at": 1.0, "message": "x \x1b[31m", "job_id": "one", "reason": "[red]\u202e"})
    out = call("logs", "one").stdout
    assert "\\x1b[31m" in out
    assert "[red]\\u202e" in out


def test_files_of_other_machines_are_named(store, logs):
    begin(store, node="gpu-7", log=(far := worker_log("merge-worker-0", "gpu-7", OWNER)))
    helper = worker_log("merge-worker-1", "gpu-8", OWNER)
    write(logs / driver_log(OWNER), {"at": 1.0, "message": "shards", "job_id": "one", "log": helper, "node": "gpu-8"})
    missing = [line for line in documents("logs", "one") if "missing" in line]
    assert missing == [{"missing": far, "node": "gpu-7"}, {"missing": helper, "node": "gpu-8"}]
    assert f"missing: {far} is on gpu-7" in call("logs", "one").stdout
    (logs / driver_log(OWNER)).unlink()
    assert f"{driver_log(OWNER)} is not on this machine any more" in call("logs", "one").stdout


def test_lines_that_made_room_for_later_ones_are_told(store, logs):
    begin(store)
    begun = store.events("one")[-1].at
    write(logs / driver_log(OWNER), {"at": begun, "message": "unit started", "job_id": "one"})
    write(logs / f"{WORKER}.1", {"at": begun + 500.0, "message": "stage begun", "job_id": "two"})
    write(logs / WORKER, {"at": begun + 900.0, "message": "stage begun", "job_id": "two"})
    assert documents("logs", "one")[1:] == [{"missing": WORKER, "node": HERE, "before": begun + 500.0}]
    assert f"missing: {WORKER} has nothing left from before" in call("logs", "one").stdout


def test_a_job_that_is_not_there_has_no_logs(store):
    assert store.ids() == ("one", "two")
    result = call("logs", "three")
    assert result.exit_code == 2
    assert "no such job: three" in result.stderr


def test_following_goes_on_until_the_job_is_final_and_over_a_rotation(store, logs):
    lease = begin(store)
    write(logs / WORKER, {"at": 1.0, "message": "first", "job_id": "one"})
    following = subprocess.Popen(
        [sys.executable, "-c", "from cluster.cli import main; main()", "logs", "one", "--follow", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with following:
        assert json.loads(following.stdout.readline())["message"] == "first"
        (logs / WORKER).rename(logs / f"{WORKER}.1")
        write(logs / f"{WORKER}.1", {"at": 2.0, "message": "second", "job_id": "one"})
        write(logs / WORKER, {"at": 3.0, "message": "third", "job_id": "one"})
        assert [json.loads(following.stdout.readline())["message"] for _ in range(2)] == ["second", "third"]
        store.fail("one", lease.token, FailureClass.BAD_INPUT, "x", Decision(state=JobState.FAILED))
        time.sleep(0.2)
        write(logs / driver_log(OWNER), {"at": 4.0, "message": "job settled", "job_id": "one"})
        assert [json.loads(line)["message"] for line in following.stdout] == ["job settled"]
    assert following.returncode == 0


def test_of_a_hundred_megabytes_only_what_may_be_about_a_job_is_read_as_json(tmp_path, monkeypatch):
    filler = "".join(
        json.dumps({"at": float(number), "message": "stage begun", "job_ids": [f"job-{number}", "x" * 150]}) + "\n"
        for number in range(10_000)
    ).encode()
    with (tmp_path / WORKER).open("wb") as file:
        for _ in range(100_000_000 // len(filler) + 1):
            file.write(filler)
    reader = LogReader(tmp_path, "job-77")
    really, num_read = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text: num_read.append(1) or really(text))
    found = reader.read({OWNER})
    assert len(found) <= len(num_read) <= 12 * len(found)  # job-770 to job-7799, too
    assert {line["at"] for line in found} == {77.0}
    assert reader.read({OWNER}) == []


def test_logs_of_drivers_that_ended_long_ago_are_purged(store, logs):
    store.register_driver(OWNER, HERE, 1, "")
    live, old = driver_log(OWNER), driver_log("gone-1-bb")
    for name in (live, old, f"{old}.1", worker_log("merge-worker-0", "gpu-7", "gone-1-bb"), "notes.txt"):
        (logs / name).touch()
        os.utime(logs / name, (1e9, 1e9))
    (logs / driver_log("new-1-cc")).touch()
    assert documents("purge", "--older-than", "1d", "--dry-run")[0]["logs"] == 3
    assert documents("purge", "--older-than", "1d")[0]["logs"] == 3
    assert {path.name for path in logs.iterdir()} == {live, driver_log("new-1-cc"), "notes.txt"}
    assert "0 log files were removed" in call("purge", "--older-than", "1d").stdout


def test_status_says_how_long_each_state_took_and_what_comes_next(tmp_path):
    clock = [1000.0]
    store = JobStore(f"sqlite:///{tmp_path}/home/mergefleet.db", lambda: clock[0])
    store.submit([MergeRequest(id="one", base="/b", adapter="/a", destination="/r/one")], "nightly")
    clock[0] = 1004.0
    lease = begin(store)
    clock[0] = 1004.5
    store.fail("one", lease.token, FailureClass.PARITY_FAILED, "not equal", Decision(state=JobState.FAILED))
    (job,) = documents("status", "one")[0]["jobs"]
    assert [(event["state"], event["seconds"]) for event in job["events"]] == [
        ("QUEUED", 4.0),
        ("LEASED", 0.0),
        ("PLANNING", 0.5),
        ("FAILED", None),
    ]
    assert job["seconds_to_publish"] is None
    assert job["next"]["kind"] == "person"
    assert "parity report" in job["next"]["text"]
    text = call("status", "one").stdout
    assert "4.0 s" in text
    assert f"attempt: 1, worker: merge-worker-0, node: {HERE}, log: {WORKER}" in text
    assert "one: next: needs a person: nothing was published" in text
    store.close()


def next_of(name="one"):
    return documents("status", name)[0]["jobs"][0]["next"]


def test_what_waits_says_for_what(store):
    assert next_of()["kind"] == "turn"
    assert "no driver is at work: start one with `mergefleet run`" in next_of()["text"]
    store.register_driver(OWNER, HERE, 1, "")
    assert next_of()["text"] == "waits for its turn"
    store.pause(Scope.BATCH, "nightly", "ann", "base is replaced")
    held = next_of()
    assert (held["kind"], held["held_by"]) == ("held", "batch nightly")
    assert "(ann, base is replaced) until `mergefleet resume batch nightly`" in held["text"]
    store.resume(Scope.BATCH, "nightly")
    store.pause(Scope.QUEUE, "", "ann", "")
    assert "until `mergefleet resume queue`" in next_of()["text"]


def test_what_a_place_holds_says_when_it_is_tried(store):
    lease = begin(store)
    pause = store.pause_place(
        "s3://bucket",
        "one",
        by=OWNER,
        failure=FailureClass.TRANSIENT_IO,
        reason="does not answer",
        state=JobState.PLANNING,
        first_seconds=60,
        max_seconds=60,
    )
    fault = Fault(place="s3://bucket", failure=FailureClass.TRANSIENT_IO, message="does not answer")
    store.let_go("one", lease.token, "s3://bucket is at fault: not charged", fault)
    held = next_of()
    assert (held["kind"], held["at"], held["held_by"]) == ("held", pause.probe_at, "place s3://bucket")
    assert "transient_io: does not answer" in held["text"]
    assert "`mergefleet resume place s3://bucket` does not wait for that" in held["text"]
    assert "place: s3://bucket" in call("status", "one").stdout


def test_what_is_tried_again_says_when(store):
    lease = begin(store)
    again = Decision(state=JobState.RETRY_WAIT, delay_seconds=100.0)
    store.fail("one", lease.token, FailureClass.OUT_OF_MEMORY, "x", again)
    (record,) = [each for each in store.jobs() if each.id == "one"]
    assert (next_of()["kind"], next_of()["at"]) == ("again", record.not_before)


def test_what_is_at_work_says_where(store):
    begin(store)
    assert next_of() == {
        "kind": "at_work",
        "text": f"at work: begun by merge-worker-0 on {HERE}",
        "at": None,
        "held_by": None,
    }
    assert next_of("two")["text"] == f"claimed by {OWNER}: waits for a worker"
