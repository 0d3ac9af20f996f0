"""The parts of the demo that can be wrong without running it."""

from collections import Counter
from pathlib import Path

from examples.chats import HABITS, HELD_OUT_QUESTION, QUESTIONS
from jobs.locations import LocalPath, S3Prefix
from jobs.request import BaseQuantization
from jobs.request_files.local_folders import LocalFolders
from jobs.request_files.reading import Origin, load_requests, read_requests, read_text
from tests.contract.test_folders import ADAPTER
from tests.releases import write_files

EXAMPLES = Path(__file__).parents[2] / "examples"
REQUESTS = EXAMPLES / "requests.yaml"


def test_the_bulk_file_holds_both_quantizations_and_both_kinds_of_destination():
    requests = load_requests(REQUESTS)
    assert Counter(request.base_quantization for request in requests) == {
        BaseQuantization.NF4: 3,
        BaseQuantization.NONE: 4,
    }
    assert {type(request.destination) for request in requests} == {LocalPath, S3Prefix}
    assert {request.adapter.name for request in requests} == {habit.name for habit in HABITS}


def test_every_question_has_an_answer_and_the_one_asked_at_the_end_is_not_among_them():
    for habit in HABITS:
        assert len(habit.chats()) == len(QUESTIONS)
    assert HELD_OUT_QUESTION not in QUESTIONS


def test_the_sweep_is_every_checkpoint_beside_the_file(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text((EXAMPLES / "sweep.yaml").read_text())
    for step in (1500, 500):
        write_files(tmp_path / "runs" / "support" / f"checkpoint-{step}", ADAPTER)
    requests = read_requests(read_text(path), Origin.of(path), listing=LocalFolders()).requests
    assert [str(request.destination) for request in requests] == [
        f"s3://releases/support/{step}" for step in (500, 1500)
    ]
    assert [request.labels["step"] for request in requests] == ["500", "1500"]
    assert len(requests[0].parity.texts) == 2
