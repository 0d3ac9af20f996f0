"""`mergefleet serve` as a process, and the other commands against it: they print what they print over a ledger."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.settings import Settings
from jobs.errors import FailureClass
from jobs.ledger.store import JobStore
from jobs.states import Decision, JobState

MAIN = "from cluster.cli import main; main()"
TOKEN = "a-token-for-serve-0123456789"


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MERGEFLEET_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


def environment(**values):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MERGEFLEET_")}
    return kept | {f"MERGEFLEET_{name.upper()}": str(value) for name, value in values.items()}


@pytest.fixture
def server(tmp_path):
    """The address of a server whose token is in a file."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    command = [sys.executable, "-c", MAIN, "serve", "--port", "0", "--json", "--log-format", "json"]
    values = environment(home=tmp_path / "server", token_path=tmp_path / "token", poll_seconds=0.1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=values) as process:
        yield json.loads(process.stdout.readline())["url"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert TOKEN not in errors
    assert '"ERROR"' not in errors


def over(monkeypatch, tmp_path, url):
    """Return what calls commands: over a ledger of their own, or against a server."""
    values = {"home": tmp_path / "local", "server": None, "token": None}
    if url is not None:
        values = {"home": tmp_path / "nothing-here", "server": url, "token": TOKEN}

    def call(*arguments):
        with monkeypatch.context() as patch:
            for name, value in values.items():
                if value is not None:
                    patch.setenv(f"MERGEFLEET_{name.upper()}", str(value))
            return CliRunner().invoke(app, arguments)

    return call


def play(call, store, tmp_path):
    """Call one command after the other; return what each printed, without times and names of machines."""
    path = tmp_path / "requests.jsonl"
    rows = [
        {"id": id_, "base": "base", "adapter": "adapter", "destination": f"out/{id_}", "labels": {"team": "x"}}
        for id_ in ("one", "two", "three")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = tmp_path / "broken.yaml"
    broken.write_text("requests:\n- {id: a, base: b, adapter: c, destination: d, dtype: int8, what: 1}\n")
    printed = [call(*words) for words in (["submit", str(path)], ["submit", "requests.jsonl", "--json"])]
    printed += [call("submit", str(broken)), call("submit", str(broken), "--json"), call("submit", "none.csv")]
    store.register_driver("driver", "host", 1, "")
    [lease] = store.claim("driver", 1, 600)
    store.fail(lease.job_id, lease.token, FailureClass.NOT_FOUND, "no such base", Decision(state=JobState.FAILED))
    for words in (
        ["status"],
        ["status", "--limit", "1", "--sort", "priority"],
        ["status", "--state", "failed", "--label", "team=x", "--since", "1h"],
        ["status", "one", "two"],
        ["status", "nobody"],
        ["status", "--batch", "nothing"],
        ["pause", "batch", "requests", "--reason", "why not"],
        ["pause", "batch", "requests"],
        ["pause", "batch", "nothing"],
        ["resume", "batch", "requests"],
        ["retry", "--failed"],
        ["cancel", "two", "--json"],
        ["cancel", "nobody"],
        ["cancel"],
        ["cancel", "--batch", "requests", "--json"],
        ["release-leases", "driver"],
        ["policy"],
        ["policy", "--json"],
        ["watch", "--batch", "requests", "--json"],
        ["watch"],
    ):
        printed.append(call(*words))
    return [(each.exit_code, each.stdout, each.stderr) for each in printed]


def test_commands_print_over_http_what_they_print_over_a_ledger(server, tmp_path, monkeypatch):
    found = []
    for url, home in ((None, "local"), (server, "server")):
        store = JobStore(f"sqlite:///{tmp_path}/{home}/mergefleet.db")
        lines = play(over(monkeypatch, tmp_path, url), store, tmp_path)
        # When drivers began, and where the ledger is, differs.
        found.append([[part.replace(f"/{home}/", "/") for part in map(str, line)] for line in lines])
        store.close()
    for mine, its in zip(*found, strict=True):
        assert without_times(mine) == without_times(its)
    assert not (tmp_path / "nothing-here").exists()


def without_times(parts):
    # A narrow column breaks a time after its date.
    times = r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d|\d+(\.\d+)? s( ago)?\b"
    return [re.sub(r" +", " ", re.sub(times, "…", part)) for part in parts]


@pytest.mark.parametrize("words", [["purge", "--older-than", "1d"], ["store", "upgrade"]])
def test_the_upkeep_of_a_ledger_is_refused_where_a_server_is_set(words, monkeypatch):
    monkeypatch.setenv("MERGEFLEET_SERVER", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "without MERGEFLEET_SERVER" in result.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SERVER": "http://user:secret-word@host:1"}, "no secret belongs into it"),
        ({"SERVER": "http://host/?token=secret-word"}, "no secret belongs into it"),
        ({"SERVER": "ftp://secret-word"}, "expected http://host:port"),
        ({"SERVER": "http://127.0.0.1:9", "TOKEN": "secret-word"}, "expected at least 16 printable ASCII characters"),
        ({"SERVER": "http://127.0.0.1:9", "TOKEN_PATH": "/no/where"}, "cannot read /no/where: No such file"),
        ({"TOKEN": "secret-word", "TOKEN_PATH": "/no/where"}, "token and token_path are both set"),
    ],
)
def test_settings_of_the_client_that_are_wrong(values, message, monkeypatch):
    for name, value in values.items():
        monkeypatch.setenv(f"MERGEFLEET_{name}", value)
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "secret-word" not in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "expected a token for 0.0.0.0, which others reach"),
        (["--host", "no.such.host.invalid"], "expected a token for no.such.host.invalid"),
        (["--host", "127.0.0.1", "--port", "TAKEN"], "cannot listen on 127.0.0.1 port"),
    ],
)
def test_where_it_does_not_listen(words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEFLEET_HOME", str(tmp_path / "home"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        result = CliRunner().invoke(app, ["serve", *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "home").exists()
