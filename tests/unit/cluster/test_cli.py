"""The command line: what it takes, what it prints, and how it ends."""

import json
import resource
import stat
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cluster.cli import app
from cluster.settings import Settings
from jobs.errors import FailureClass
from jobs.ledger.schema import SCHEMA
from jobs.ledger.store import JobStore
from jobs.states import Decision, JobState

MAIN = "from cluster.cli import main; main()"

SURFACE = {
    "approve": ["[ids]", "--batch", "--label", "--by", "--json", "--debug"],
    "reject": ["[ids]", "--batch", "--label", "--by", "--reason", "--json", "--debug"],
    "cancel": ["[ids]", "--batch", "--state", "--label", "--json", "--debug"],
    "check": ["location", "--engine", "--json", "--debug"],
    "logs": ["job", "--follow", "--json", "--debug"],
    "merge": [
        "--base",
        "--adapter",
        "--to",
        "--base-quantization",
        "--dtype",
        "--output",
        "--keep",
        "--parity",
        "--compare",
        "--accept-unstable",
        "--log-format",
        "--json",
        "--debug",
    ],
    "pause": ["what", "[name]", "--reason", "--json", "--debug"],
    "plan": ["file", "--json", "--debug"],
    "policy": ["--json", "--debug"],
    "pull": ["location", "directory", "--json", "--debug"],
    "purge": ["--older-than", "--dry-run", "--json", "--debug"],
    "release-leases": ["driver", "--json", "--debug"],
    "report": ["batch", "--to", "--json", "--debug"],
    "resume": ["what", "[name]", "--json", "--debug"],
    "retry": ["[ids]", "--batch", "--state", "--label", "--failed", "--class", "--json", "--debug"],
    "run": ["--drain", "--workers", "--address", "--log-format", "--json", "--debug"],
    "serve": ["--host", "--port", "--log-format", "--json", "--debug"],
    "status": ["[ids]", "--batch", "--state", "--label", "--since", "--limit", "--sort", "--json", "--debug"],
    "store upgrade": ["--json", "--debug"],
    "submit": ["file", "--batch", "--json", "--debug"],
    "verify": [
        "location",
        "--against",
        "--base",
        "--parity",
        "--min-survival",
        "--max-error",
        "--max-kl",
        "--min-top1",
        "--max-lost-share",
        "--json",
        "--debug",
    ],
    "watch": ["--batch", "--label", "--json", "--debug"],
}
"""Scripts rely on it: a change here is a change for every user, and belongs in the changelog."""


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MERGEFLEET_{name.upper()}", raising=False)
    monkeypatch.setenv("MERGEFLEET_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path}/home/mergefleet.db")
    yield store
    store.close()


def call(*arguments):
    return CliRunner().invoke(app, arguments)


def json_of(result):
    """The one document of a command with --json."""
    [line] = result.stdout.splitlines()
    return json.loads(line)


def requests_file(tmp_path, *ids, **fields):
    path = tmp_path / "requests.jsonl"
    lines = [{"id": id_, "base": "base", "adapter": "adapter", "destination": f"out/{id_}", **fields} for id_ in ids]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_commands_and_their_arguments_are_these():
    found = {}
    commands = dict(get_command(app).commands)
    commands |= {f"store {name}": each for name, each in commands.pop("store").commands.items()}
    for name, command in commands.items():
        names = []
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                names.append(parameter.name if parameter.required else f"[{parameter.name}]")
            else:
                names += parameter.opts
        found[name] = [each for each in names if each != "--help"]
    assert found == SURFACE


def test_help_comes_at_once_and_loads_nothing_heavy():
    code = (
        "import sys, cluster.cli\n"
        "heavy = {'torch', 'ray', 'sqlalchemy', 'boto3', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", MAIN, "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: how long it takes by the clock depends on what else runs.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_submit_queues_and_the_same_file_again_changes_nothing(tmp_path):
    path = requests_file(tmp_path, "one", "two")
    batch = {"batch": "requests"}
    for created, unchanged in ((["one", "two"], []), ([], ["one", "two"])):
        told = batch | {"created": created, "unchanged": unchanged, "left_out": []}
        assert json_of(call("submit", path, "--json")) == told
    assert call("submit", path).stdout == "batch requests: 0 jobs queued, 2 were there already\n"


def test_every_problem_of_a_file_is_told_and_nothing_is_queued(tmp_path, store):
    path = requests_file(tmp_path, "one", "two", dtype="int8", priority="high")
    result = call("submit", path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [f"requests.jsonl:{line}" in result.stderr for line in (1, 2)] == [True, True]
    problems = json_of(call("submit", path, "--json"))["error"]["problems"]
    assert sorted((problem["line"], problem["field"]) for problem in problems) == [
        (1, "dtype"),
        (1, "priority"),
        (2, "dtype"),
        (2, "priority"),
    ]
    assert store.jobs() == ()


@pytest.mark.parametrize("command", ["plan", "submit"])
def test_a_missing_file_is_bad_input(command):
    result = call(command, "nothing.yaml", "--json")
    assert result.exit_code == 2
    assert json_of(result)["error"]["class"] == "bad_input"


def test_status_shows_counts_and_jobs(tmp_path, store):
    call("submit", requests_file(tmp_path, "one", "two", labels={"team": "search"}))
    [lease] = store.claim("driver", 1, 60)
    store.fail(lease.job_id, lease.token, FailureClass.NOT_FOUND, "no such base", Decision(state=JobState.FAILED))
    document = json_of(call("status", "--json"))
    assert document["counts"]["FAILED"] == 1
    assert [(job["id"], job["state"]) for job in document["jobs"]] == [("one", "FAILED"), ("two", "QUEUED")]
    assert document["jobs"][0]["failure"] == {"class": "not_found", "message": "no such base"}
    assert [job["id"] for job in json_of(call("status", "--state", "failed", "--json"))["jobs"]] == ["one"]
    assert [job["id"] for job in json_of(call("status", "two", "--json"))["jobs"]] == ["two"]
    assert len(json_of(call("status", "--label", "team=search", "--json"))["jobs"]) == 2
    assert json_of(call("status", "--label", "team=ads", "--json"))["jobs"] == []
    text = call("status").stdout
    assert "not_found: no such base" in text
    assert "1 QUEUED  1 FAILED" in text


def test_the_status_of_a_job_by_id_has_its_events(tmp_path, store):
    call("submit", requests_file(tmp_path, "one", "two"))
    [lease] = store.claim("driver", 1, 60)
    message = f"no such base: {'x' * 1000} \u202eend"
    store.fail(lease.job_id, lease.token, FailureClass.NOT_FOUND, message, Decision(state=JobState.FAILED))
    document = json_of(call("status", "one", "two", "--json"))
    one, two = (job["events"] for job in document["jobs"])
    assert [(event["sequence"], event["state"]) for event in one] == [(1, "QUEUED"), (2, "LEASED"), (3, "FAILED")]
    assert one[1]["detail"] == {"owner": "driver", "token": lease.token}
    assert [event["state"] for event in two] == ["QUEUED"]
    assert "events" not in json_of(call("status", "--json"))["jobs"][0]
    text = "".join(call("status", "one").stdout.split())
    assert f"owner:driver,token:{lease.token}" in text
    assert f"{'x' * 1000}\\u202eend" in text
    assert "owner:driver" not in "".join(call("status", "--state", "failed").stdout.split())


def test_jobs_are_cancelled_and_retried_by_choice_and_never_by_default(tmp_path):
    call("submit", requests_file(tmp_path, "one", "two"))
    assert call("cancel").exit_code == 2
    assert json_of(call("cancel", "--state", "queued", "--json")) == {"cancelled": ["one", "two"]}
    assert json_of(call("retry", "two", "--json")) == {"retried": ["two"]}
    assert json_of(call("status", "--json"))["counts"]["CANCELLED"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nobody"], "no such job: nobody"),
        (["retry", "--label", "team"], "--label: expected K=V, found 'team'"),
        (["status", "a\udcff"], "expected ids, labels and batches in UTF-8, found 'a\\udcff'"),
        (["cancel", "--label", "a=\udcff"], "expected ids, labels and batches in UTF-8, found 'a=\\udcff'"),
        (["status", "--batch", "nightly"], "no such batch: nightly; there are: none"),
        (["pause", "everything"], "expected queue, batch, base or place, found 'everything'"),
        (["pause", "queue", "x"], "expected no name after queue, found 'x'"),
        (["resume", "batch"], "expected the name of a batch, found ''"),
        (["pause", "batch", "nightly"], "has no batch nightly"),
        (["pause", "place", "ftp://x"], "expected a place: s3://bucket, hf://, a directory or node:NAME"),
        (["release-leases", "me"], "has no driver me"),
        (["purge", "--older-than", "long"], "expected a number with s, m, h, d or w, found 'long'"),
        (["verify", "ftp://x/y"], "found another URL, 'ftp://x/y'"),
        (["verify", "nothing-here"], "nothing-here"),
        (
            ["merge", "--base", "b", "--adapter", "x/a", "--adapter", "y/a", "--to", "o"],
            "several adapters are called a",
        ),
        (
            ["merge", "--base", "b", "--adapter", "x/a", "--adapter", "y/my a", "--to", "hf://org/m"],
            "--to: expected hf://owner/name or hf://owner/name/folder, with @revision or not, found 'hf://org/m-my a",
        ),
        (["merge", "--base", "ftp://b", "--adapter", "a", "--to", "o"], "--base: expected a path"),
        (
            ["merge", "--base", "b", "--adapter", "a", "--to", "b"],
            "expected a place outside the base, which is never overwritten",
        ),
    ],
)
@pytest.mark.usefixtures("store")
def test_bad_arguments_end_with_one_clear_message(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert message in json_of(call(*arguments, "--json"))["error"]["message"]


@pytest.mark.usefixtures("store")
def test_a_fault_of_mergefleet_is_one_message_and_a_traceback_for_its_owner(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("half a \ud800 pair")

    monkeypatch.setattr(JobStore, "counts", fail)
    monkeypatch.setattr("sys.argv", ["mergefleet", "status", "\udcff"])
    log = tmp_path / "home" / "faults.log"
    result = call("status")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: RuntimeError: half a \\ud800 pair; this is a fault of mergefleet")
    assert "Traceback" not in result.stderr
    assert "mergefleet status \\udcff" in log.read_text()
    assert log.read_text().endswith("RuntimeError: half a \\ud800 pair\n")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_an_unknown_option_is_bad_input():
    assert call("submit", "--frobnicate").exit_code == 2


def test_an_unknown_setting_is_bad_input(monkeypatch):
    monkeypatch.setenv("MERGEFLEET_STOR", "sqlite:///x.db")
    result = call("status")
    assert result.exit_code == 2
    assert "nearest: MERGEFLEET_STORE" in result.stderr


def test_debug_shows_where_an_error_came_from():
    assert "Traceback" in call("status", "nobody", "--debug").stderr


@pytest.mark.usefixtures("store")
def test_a_fault_is_called_one_and_its_traceback_kept(monkeypatch, tmp_path):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(JobStore, "counts", broken)
    result = call("status")
    assert result.exit_code == 1
    assert "this is a fault of mergefleet" in result.stderr
    log = tmp_path / "home" / "faults.log"
    assert str(log) in result.stderr.replace("\n", "")
    assert "in broken" in log.read_text()


def test_watch_ends_when_every_job_is_final(tmp_path, store):
    call("submit", requests_file(tmp_path, "one"))
    [lease] = store.claim("driver", 1, 60)
    watching = subprocess.Popen(
        [sys.executable, "-c", MAIN, "watch", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with watching:
        assert json.loads(watching.stdout.readline())["bases"][0]["stages"] == {"leased": 1}
        failed = Decision(state=JobState.FAILED)
        store.fail(lease.job_id, lease.token, FailureClass.PARITY_FAILED, "not equal", failed)
        lines = [json.loads(line) for line in watching.stdout]
    cause = {"failure_class": "parity_failed", "num_jobs": 1, "message": "not equal", "ids": ["one"]}
    assert lines[-1] == {"event": "done", "counts": {"FAILED": 1}, "failures": [cause]}
    assert watching.returncode == 3


@pytest.mark.usefixtures("store")
def test_watching_nothing_ends_at_once():
    result = call("watch")
    assert (result.exit_code, result.stdout) == (0, "no jobs\n")


@pytest.mark.parametrize("command", ["status", "watch", "cancel", "retry"])
def test_a_ledger_that_is_not_there_is_told_and_not_made(tmp_path, command):
    result = call(command, "--batch", "x")
    assert result.exit_code == 2
    assert "there is no ledger here; `mergefleet submit` makes one" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "home").exists()


def test_a_batch_is_followed_cancelled_and_tried_again_by_its_name(tmp_path, store):
    call("submit", requests_file(tmp_path, "one", "two"), "--batch", "nightly")
    call("submit", requests_file(tmp_path, "three"), "--batch", "other")
    document = json_of(call("status", "--json"))
    assert [(each["name"], each["request_counts"]["total"]) for each in document["batches"]] == [
        ("nightly", 2),
        ("other", 1),
    ]
    assert json_of(call("cancel", "--batch", "nightly", "--json")) == {"cancelled": ["one", "two"]}
    [_, done] = call("watch", "--batch", "nightly", "--json").stdout.splitlines()
    assert json.loads(done)["counts"] == {"CANCELLED": 2}
    lease = store.claim("driver", 1, 60)[0]
    store.fail("three", lease.token, FailureClass.NOT_FOUND, "gone", Decision(state=JobState.FAILED))
    assert json_of(call("retry", "--failed", "--class", "auth", "--json")) == {"retried": []}
    assert json_of(call("retry", "--failed", "--class", "not_found", "--json")) == {"retried": ["three"]}
    assert call("watch", "--batch", "nightly").exit_code == 0


def test_what_is_paused_is_shown_with_its_reason_until_it_goes_on(tmp_path, store):
    call("submit", requests_file(tmp_path, "one", "two"), "--batch", "nightly")
    assert "is paused" in call("pause", "batch", "nightly", "--reason", "the base is being replaced").stdout
    assert "was paused already" in call("pause", "batch", "nightly").stdout
    assert store.claim("driver", 2, 60) == ()
    [paused] = json_of(call("status", "--json"))["paused"]
    assert (paused["scope"], paused["name"], paused["reason"], paused["num_jobs"]) == (
        "batch",
        "nightly",
        "the base is being replaced",
        2,
    )
    assert "the base is being replaced" in call("status").stdout
    assert "goes on" in call("resume", "batch", "nightly").stdout
    assert "was not paused" in call("resume", "batch", "nightly").stdout
    assert len(store.claim("driver", 2, 60)) == 2


def test_the_policy_is_that_of_the_settings(monkeypatch):
    monkeypatch.setenv("MERGEFLEET_MAX_ATTEMPTS", "7")
    monkeypatch.setenv("MERGEFLEET_POLICY", '{"parity_failed": {"attempts": 2}}')
    policy = json_of(call("policy", "--json"))["policy"]
    assert policy.keys() == {each.value for each in FailureClass}
    assert (policy["transient_io"]["attempts"], policy["transient_io"]["pauses_place"]) == (7, True)
    assert (policy["parity_failed"]["attempts"], policy["bad_input"]["attempts"]) == (2, 1)
    monkeypatch.setenv("MERGEFLEET_POLICY", '{"parity_failed": {"attempt": 2}}')
    result = call("policy")
    assert result.exit_code == 2
    assert "MERGEFLEET_POLICY" in result.stderr


def test_old_jobs_are_forgotten_with_their_reports(tmp_path, store):
    call("submit", requests_file(tmp_path, "old", "new"))
    report = tmp_path / "reports" / "old"
    report.mkdir(parents=True)
    for lease in store.claim("driver", 2, 60):
        failed = Decision(state=JobState.FAILED)
        store.fail(
            lease.job_id,
            lease.token,
            FailureClass.BAD_INPUT,
            "x",
            failed,
            report_path=str(tmp_path / "reports" / lease.job_id),
        )
    assert json_of(call("purge", "--older-than", "1d", "--json"))["jobs"] == 0
    assert json_of(call("purge", "--older-than", "0s", "--dry-run", "--json")) == {
        "jobs": 2,
        "reports": 1,
        "logs": 0,
        "dry_run": True,
    }
    assert report.exists()
    assert json_of(call("purge", "--older-than", "0s", "--json"))["jobs"] == 2
    assert (report.exists(), store.jobs(), store.batches()) == (False, (), ())


def test_a_driver_says_what_is_wrong_where_a_program_reads_it(tmp_path, monkeypatch):
    """Its process is another one than that of the command."""
    monkeypatch.setenv("MERGEFLEET_STORE", f"sqlite:///{tmp_path}")
    done = subprocess.run([sys.executable, "-c", MAIN, "run", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["class"] == "bad_input"
    assert done.stderr == ""


def test_upgrading_a_ledger_of_this_version_changes_nothing(store):
    assert json_of(call("store", "upgrade", "--json")) == {"from": SCHEMA, "to": SCHEMA}
    assert store.jobs() == ()
