"""The parts of the demo that can be wrong without running it."""

from collections import Counter
from pathlib import Path

from examples.chats import HABITS, HELD_OUT_QUESTION, QUESTIONS
from jobs.locations import LocalPath, S3Prefix
from jobs.request import BaseQuantization
from jobs.request_files.reading import load_requests

REQUESTS = Path(__file__).parents[2] / "examples" / "requests.yaml"


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
