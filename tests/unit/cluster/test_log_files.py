"""Log files: what they hold and what never gets into them, how large they grow, and what a fork leaves of them."""

import json
import logging
import os
import stat
import subprocess
import sys

import pytest

from cluster import log_files as kept
from cluster.log_files import LogFile, driver_log, make_room, owner_of, start_log, worker_log, written_log

OWNER = "gpu-1.example-4242-0a1b2c3d"
logger = logging.getLogger("workers.worker")


@pytest.fixture(autouse=True)
def _root_untouched():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = [handler.level for handler in handlers]
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for handler, each in zip(handlers, levels, strict=True):
        handler.setLevel(each)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_names_say_who_writes_where_for_which_driver(tmp_path):
    name = worker_log("merge-worker-3", "node-7.example", OWNER)
    assert name == f"merge-worker-3@node-7.example@{OWNER}.jsonl"
    assert (
        owner_of(tmp_path / name) == owner_of(tmp_path / f"{name}.2") == owner_of(tmp_path / driver_log(OWNER)) == OWNER
    )
    assert [owner_of(tmp_path / each) for each in ("notes.jsonl", "a@b.txt", f"{name}.part")] == [None, None, None]


def test_a_file_is_for_its_owner_alone_and_holds_our_records_from_info_on(tmp_path):
    os.umask(umask := os.umask(0))
    with written_log(tmp_path / "logs", "driver@x.jsonl"):
        logger.info("unit begun", extra={"unit": "merge:b", "job_ids": ["one"]})
        logger.debug("too much")
        logging.getLogger("httpx2").info("HTTP Request: GET https://cdn/x?X-Amz-Signature=abc")
        logging.getLogger("urllib3").warning("retrying")
    logger.info("after")
    path = tmp_path / "logs" / "driver@x.jsonl"
    assert (stat.S_IMODE(path.parent.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o600)
    assert [line["message"] for line in lines(path)] == ["unit begun", "retrying"]
    assert lines(path)[0].items() >= {"level": "INFO", "logger": "workers.worker", "job_ids": ["one"]}.items()
    assert umask == os.umask(umask)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("GET https://bucket.example/a/b?X-Amz-Signature=0123&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE failed", "0123"),
        ("cannot reach postgresql://me:hunter2@db.example/jobs", "hunter2"),
        ("Authorization: Bearer abc.def-123", "abc.def"),
        ("token hf_abcdefghijklmnopqrstuvwxyz", "hf_abcdef"),
        ('{"url": "https://cdn.example/x?sig=s3cr3t"}', "s3cr3t"),
    ],
)
def test_no_secret_gets_into_a_file(tmp_path, text, secret):
    with written_log(tmp_path, "driver@x.jsonl"):
        logger.warning(text, extra={"reason": text})
        logger.error("failed", exc_info=OSError(text))
    found = (tmp_path / "driver@x.jsonl").read_text()
    assert secret not in found
    assert len(lines(tmp_path / "driver@x.jsonl")) == 2


def test_places_are_no_secrets(tmp_path):
    text = "hf://owner/name@main and s3://bucket/a@b and /a/b?c and https://host/path"
    with written_log(tmp_path, "driver@x.jsonl"):
        logger.info(text)
    assert lines(tmp_path / "driver@x.jsonl")[0]["message"] == text


def test_each_line_says_what_is_in_work_unless_it_says_so_itself(tmp_path):
    file = start_log(tmp_path, "w@h@x.jsonl", lambda: {"unit": "merge:b", "job_ids": ["one", "two"]})
    logger.info("copied")
    logger.info("begun", extra={"job_ids": ["three"]})
    file.flush()
    assert [line["job_ids"] for line in lines(tmp_path / "w@h@x.jsonl")] == [["one", "two"], ["three"]]


def test_others_who_log_see_what_they_saw_before(tmp_path):
    seen = []

    class Other(logging.Handler):
        def emit(self, record):
            record.job_id = "of another system"  # as Ray's filter does
            seen.append(record.getMessage())

    root = logging.getLogger()
    root.handlers[:] = [Other()]
    root.setLevel(logging.WARNING)
    with written_log(tmp_path, "driver@x.jsonl"):
        logger.info("only in the file")
        logger.warning("in both", extra={"job_id": "one"})
    assert seen == ["in both"]
    assert lines(tmp_path / "driver@x.jsonl")[1]["job_id"] == "one"


def test_a_file_is_rotated_and_all_parts_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MAX_FILE_BYTES", 2_000)
    with written_log(tmp_path, "driver@x.jsonl"):
        for number in range(200):
            logger.info("line %d", number)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 1 + kept.NUM_OLD_FILES
    assert all(part.stat().st_size <= 2_000 and stat.S_IMODE(part.stat().st_mode) == 0o600 for part in parts)
    assert lines(tmp_path / "driver@x.jsonl")[-1]["message"] == "line 199"


FORKING = """
import logging, os, sys
from pathlib import Path
from cluster.log_files import start_log

start_log(Path(sys.argv[1]), "w@h@x.jsonl")
logger = logging.getLogger("workers.unit.forks")
logger.warning("before")
reader, writer = os.pipe()
child = os.fork()
if not child:
    os.closerange(3, writer)
    os.closerange(writer + 1, 64)
    os.dup2(writer, 3)  # what was the file of the log is a pipe to the parent now, as in the server of try-outs
    for number in range(100):
        logger.warning("in the child")
    os.write(3, b"answer")
    os._exit(0)
os.close(writer)
os.waitpid(child, 0)
print(os.read(reader, 1 << 16))
logger.warning("after")
"""


def test_a_fork_writes_neither_to_the_file_nor_to_what_has_its_descriptor_now(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORKING, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "b'answer'\n"
    assert [line["message"] for line in lines(tmp_path / "w@h@x.jsonl")] == ["before", "after"]


def test_a_file_that_cannot_be_written_stops_nothing_and_is_told_once(tmp_path, capsys):
    (tmp_path / "logs").write_text("no directory")
    logging.getLogger().handlers[:] = []
    with written_log(tmp_path / "logs", "driver@x.jsonl"):
        for _ in range(3):
            logger.warning("x")
    assert capsys.readouterr().err.count("lines are lost") == 1


def test_what_is_oldest_makes_room_and_what_may_be_in_use_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MAX_TOTAL_BYTES", 250)
    for age, name in enumerate(["driver@now.jsonl", "driver@new.jsonl", "w@h@old.jsonl", "w@h@old.jsonl.1"]):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1e9 - 100_000 * age, 1e9 - 100_000 * age))
    (tmp_path / "notes.txt").write_bytes(b"x" * 1000)
    make_room(tmp_path, 1e9)
    assert {path.name for path in tmp_path.iterdir()} == {"driver@now.jsonl", "driver@new.jsonl", "notes.txt"}
    make_room(tmp_path / "missing", 1e9)


def test_nothing_is_made_before_there_is_something_to_say(tmp_path):
    LogFile(tmp_path / "logs" / "driver@x.jsonl", dict).close()
    assert list(tmp_path.iterdir()) == []
