"""Log records as lines: JSON for programs, text for people, both with what was given as extra."""

import json
import logging
import sys

import pytest

from cluster.logs import JsonFormatter, TextFormatter, configure_logging


@pytest.fixture
def _root_untouched():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def record(**extra):
    made = logging.LogRecord("cluster.driving.driver", logging.INFO, __file__, 1, "job %s", ("settled",), None)
    vars(made).update(extra)
    return made


def test_json_has_message_and_extra():
    document = json.loads(JsonFormatter().format(record(job_id="one", path=sys)))
    assert (document["message"], document["logger"], document["job_id"]) == (
        "job settled",
        "cluster.driving.driver",
        "one",
    )


def test_json_keeps_a_traceback_on_one_line():
    error = KeyError("x")
    made = record()
    made.exc_info = (KeyError, error, None)
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "KeyError" in json.loads(line)["traceback"]


def test_text_puts_extra_behind_the_message():
    assert TextFormatter().format(record(job_id="one")).endswith("INFO cluster.driving.driver: job settled job_id=one")


@pytest.mark.usefixtures("_root_untouched")
@pytest.mark.parametrize(("log_format", "level"), [(None, logging.WARNING), ("json", logging.INFO)])
def test_a_format_asks_for_everything_from_info_on(log_format, level):
    configure_logging(log_format)
    assert logging.getLogger().level == level
