"""Progress and cancellation, from any thread."""

import threading
import time

import pytest

from jobs.errors import CancelledError
from workers.merging.tracker import Tracker

NOBODY = frozenset[str]


def test_a_unit_begins_with_nothing_done():
    progress = Tracker("merge:llama:2 adapters", ["a", "b"], NOBODY).progress()
    assert progress.unit == "merge:llama:2 adapters"
    assert progress.stages == {"a": "fetch", "b": "fetch"}
    assert (progress.bytes_done, progress.bytes_total) == (0, 0)


def test_stages_are_those_of_each_job():
    tracker = Tracker("unit", ["a", "b", "c"], NOBODY)
    tracker.enter("merge", ["a", "c"])
    tracker.enter("staged", iter(["c"]))
    assert tracker.progress().stages == {"a": "merge", "b": "fetch", "c": "staged"}


def test_what_was_asked_for_is_not_changed_afterwards():
    tracker = Tracker("unit", ["a"], NOBODY)
    before = tracker.progress()
    tracker.enter("merge", ["a"])
    tracker.advance(5)
    assert before.stages == {"a": "fetch"}
    assert before.bytes_done == 0


def test_no_byte_is_lost_between_threads():
    tracker = Tracker("unit", ["a"], NOBODY)
    seen = []

    def work():
        for _ in range(2000):
            tracker.expect(2)
            tracker.advance(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(tracker.progress())
    for thread in threads:
        thread.join()
    assert (tracker.progress().bytes_done, tracker.progress().bytes_total) == (8000, 16000)
    assert [each.bytes_done for each in seen] == sorted(each.bytes_done for each in seen)
    assert all(each.bytes_done <= each.bytes_total for each in seen)


def test_a_job_stops_when_it_is_asked_to_and_no_other():
    cancelled = frozenset[str]()
    tracker = Tracker("unit", ["a", "b"], lambda: cancelled)
    tracker.check("a")
    cancelled = frozenset({"a"})
    with pytest.raises(CancelledError, match="job a was cancelled"):
        tracker.check("a")
    tracker.check("b")


def test_what_jobs_share_stops_when_all_of_them_were_asked_to():
    cancelled = frozenset({"a", "c"})
    tracker = Tracker("unit", ["a", "b"], lambda: cancelled)
    tracker.check_all(["a", "b"])
    tracker.check_all([])
    with pytest.raises(CancelledError, match="all jobs of unit"):
        tracker.check_all(["a"])
    cancelled = frozenset({"a", "b", "c"})
    with pytest.raises(CancelledError):
        tracker.check_all(["a", "b"])


def stopped(tracker):
    with tracker.timed("merge"):
        time.sleep(0.01)
        raise CancelledError("stop")


def test_time_is_counted_by_stage_also_where_it_fails():
    tracker = Tracker("unit", ["a"], NOBODY)
    with tracker.timed("merge"):
        time.sleep(0.01)
    with pytest.raises(CancelledError):
        stopped(tracker)
    with tracker.timed("upload"):
        pass
    assert tracker.seconds["merge"] >= 0.02
    assert tracker.seconds["upload"] < tracker.seconds["merge"]
