"""What a person sees of text from outside: every character, none of its effects."""

import contextlib
import io
import json
import logging
import os

import pytest

from cluster.commands import run as run_command
from cluster.commands.watch import watch_jobs
from cluster.console.display import event_line, note_line
from cluster.console.queue_views import job_table
from cluster.console.terminal import Terminal
from cluster.driving.events import JobSettled, WorkerReplaced
from cluster.logs import TextFormatter
from jobs.errors import BadInputError, FailureClass
from jobs.ledger.selection import ALL
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import Decision, JobState
from workers.merging.outcomes import Failure

HOSTILE = "[red]a[/red] :smile: \x1b[2J\u202e\ud800 [link=http://x]y"
VISIBLE = "[red]a[/red] :smile: \\x1b[2J\\u202e\\ud800 [link=http://x]y"


@pytest.fixture
def terminal(monkeypatch):
    """A terminal whose output is read back, as UTF-8."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", stdout)
    shown = Terminal(as_json=False)
    shown.out.width = 400

    def read():
        stdout.flush()
        return stdout.buffer.getvalue().decode()

    return shown, read


def settled(message):
    return JobSettled(job_id="a", state=JobState.FAILED, failure_class=FailureClass.BAD_INPUT, message=message)


def test_an_event_is_shown_as_data(terminal):
    output, read = terminal
    output.show(event_line(settled(HOSTILE)))
    output.show(event_line(WorkerReplaced(worker="w", reason=HOSTILE, job_ids=())))
    output.show(f"reports {HOSTILE}")
    assert read().count(VISIBLE) == 3


def test_a_note_of_a_release_is_shown_as_data(terminal):
    output, read = terminal
    published = JobSettled(job_id="a", state=JobState.PUBLISHED, location=HOSTILE, notes=(HOSTILE,))
    output.show(event_line(published))
    output.show(note_line(HOSTILE, HOSTILE))
    assert read().count(VISIBLE) == 4


def test_a_table_shows_names_and_messages_as_data(terminal, tmp_path):
    output, read = terminal
    with contextlib.closing(JobStore(f"sqlite:///{tmp_path}/jobs.db")) as store:
        request = MergeRequest(id="a", base="/bases/[bold]b :tada:", adapter="/adapters/\u202ec", destination="/r/a")
        store.submit([request])
        [lease] = store.claim("driver", 1, 60)
        failure = Failure.of(BadInputError(HOSTILE))
        store.fail("a", lease.token, failure.failure_class, failure.message, Decision(state=JobState.FAILED))
        output.show(job_table(store.jobs()))
    assert VISIBLE in read()
    assert "[bold]b :tada: (default)" in read()
    assert "\\u202ec" in read()


def test_watching_writes_json_alone_to_a_terminal(monkeypatch, tmp_path):
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", stdout)
    with contextlib.closing(JobStore(f"sqlite:///{tmp_path}/jobs.db")) as store:
        watch_jobs(Terminal(as_json=True), store, ALL, poll_seconds=0)
    assert [json.loads(line)["event"] for line in stdout.getvalue().splitlines()] == ["progress", "done"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_reader_that_is_gone_ends_no_batch(as_json, monkeypatch, tmp_path, caplog):
    reading, writing = os.pipe()
    os.close(reading)
    stdout = os.fdopen(writing, "w", encoding="utf-8")
    monkeypatch.setattr("sys.stdout", stdout)
    output = Terminal(as_json=as_json)
    with (
        contextlib.closing(JobStore(f"sqlite:///{tmp_path}/jobs.db")) as store,
        run_command._listening(output, store) as listener,
    ):
        listener(settled("one"))
        listener(settled("two"))
    stdout.close()  # what is left in it has somewhere to go
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the batch goes on" in caplog.text


def test_a_log_shows_messages_values_and_tracebacks_as_data():
    fault = ValueError, ValueError(HOSTILE), None
    record = logging.makeLogRecord({"msg": "no %s", "args": (HOSTILE,), "exc_info": fault, "path": HOSTILE})
    line = TextFormatter().format(record)
    assert line.count(VISIBLE) == 3
    line.encode()
