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
from jobs.ledger.store import JobStore
from jobs.states import Decision, JobState

MAIN = "from cluster.cli import main; main()"

SURFACE = {
    "cancel": ["[ids]", "--state", "--label", "--json", "--debug"],
    "merge": [
        "--base",
        "--adapter",
        "--to",
        "--base-quantization",
        "--dtype",
        "--parity",
        "--compare",
        "--accept-unstable",
        "--log-format",
        "--json",
        "--debug",
    ],
    "plan": ["file", "--json", "--debug"],
    "pull": ["location", "directory", "--json", "--debug"],
    "retry": ["[ids]", "--state", "--label", "--json", "--debug"],
    "run": ["--drain", "--workers", "--address", "--log-format", "--json", "--debug"],
    "status": ["[ids]", "--state", "--label", "--json", "--debug"],
    "submit": ["file", "--json", "--debug"],
    "verify": ["location", "--json", "--debug"],
    "watch": ["--json", "--debug"],
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
    for name, command in get_command(app).commands.items():
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
    assert json_of(call("submit", path, "--json")) == {"created": ["one", "two"], "unchanged": []}
    assert json_of(call("submit", path, "--json")) == {"created": [], "unchanged": ["one", "two"]}
    assert call("submit", path).stdout == "0 jobs queued, 2 were there already\n"


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
    assert one[1]["detail"] == {"attempt": 1, "owner": "driver", "token": lease.token}
    assert [event["state"] for event in two] == ["QUEUED"]
    assert "events" not in json_of(call("status", "--json"))["jobs"][0]
    text = "".join(call("status", "one").stdout.split())
    assert "attempt:1,owner:driver" in text
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
        (["status", "a\udcff"], "expected ids and labels in UTF-8, found 'a\\udcff'"),
        (["cancel", "--label", "a=\udcff"], "expected ids and labels in UTF-8, found 'a=\\udcff'"),
        (["verify", "ftp://x/y"], "found another URL, 'ftp://x/y'"),
        (["verify", "nothing-here"], "nothing-here"),
        (
            ["merge", "--base", "b", "--adapter", "x/a", "--adapter", "y/a", "--to", "o"],
            "several adapters are called a",
        ),
        (
            ["merge", "--base", "b", "--adapter", "x/a", "--adapter", "y/my a", "--to", "hf://org/m"],
            "--to: expected hf://owner/name or hf://owner/name@revision, found 'hf://org/m-my a@main'",
        ),
        (["merge", "--base", "ftp://b", "--adapter", "a", "--to", "o"], "--base: expected a path"),
        (
            ["merge", "--base", "b", "--adapter", "a", "--to", "b"],
            "expected a place outside the base, which is never overwritten",
        ),
    ],
)
def test_bad_arguments_end_with_one_clear_message(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert message in json_of(call(*arguments, "--json"))["error"]["message"]


def test_a_fault_of_mergefleet_is_one_message_and_a_traceback_for_its_owner(tmp_path, monkeypatch):
    def fail(_):
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
    assert lines[-1] == {"event": "done", "counts": {"FAILED": 1}}
    assert watching.returncode == 3


def test_watching_nothing_ends_at_once():
    result = call("watch")
    assert (result.exit_code, result.stdout) == (0, "no jobs\n")
