"""Which jobs a question is about, in which order, and in pages."""

import pytest
from sqlalchemy import update

from jobs.errors import FailureClass
from jobs.ledger.schema import jobs
from jobs.ledger.selection import Selection
from jobs.states import Decision, JobState


class TestSelection:
    @pytest.fixture
    def filled(self, store, driver, make_request):
        """Jobs a to f: two batches, priorities, labels, states and failures; changed at 100, 200, …, 600."""
        priorities = {"a": 0, "b": 5, "c": 0, "d": 9, "e": 5, "f": 0}
        for batch, names in (("one", "abc"), ("two", "def")):
            team = {"team": batch}
            store.submit([make_request(name, labels=team, priority=priorities[name]) for name in names], batch)
        for name, failure in (("d", FailureClass.BAD_INPUT), ("b", FailureClass.AUTH), ("e", FailureClass.AUTH)):
            token = driver.claim(name).token
            state = JobState.RETRY_WAIT if name == "e" else JobState.FAILED
            store.fail(name, token, failure, f"{name} failed", Decision(state=state, delay_seconds=999))
        store.cancel(["f"])
        with store._database.write() as connection:
            for number, name in enumerate("abcdef", start=1):
                connection.execute(update(jobs).where(jobs.c.id == name).values(updated_at=number * 100))

    @pytest.mark.usefixtures("filled")
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, "abcdef"),
            ({"batch": "two"}, "def"),
            ({"batch": "none"}, ""),
            ({"states": [JobState.FAILED, JobState.CANCELLED]}, "bdf"),
            ({"failures": [FailureClass.AUTH]}, "be"),
            ({"failures": [FailureClass.AUTH, FailureClass.BAD_INPUT], "states": [JobState.FAILED]}, "bd"),
            ({"failures": []}, ""),
            ({"since": 400}, "def"),
            ({"since": 400.5}, "ef"),
            ({"unfinished_at": 450}, "acef"),
            ({"labels": {"team": "one"}, "since": 200}, "bc"),
            ({"ids": ["e", "a", "x"], "batch": "one"}, "a"),
            ({"batch": "two", "labels": {"team": "one"}}, ""),
        ],
    )
    def test_it_is_all_of_what_is_said(self, store, fields, expected):
        selection = Selection(**fields)
        assert "".join(job.id for job in store.jobs(selection)) == expected
        assert "".join(store.ids(selection)) == expected
        if "ids" not in fields:
            assert sum(store.counts(selection).values()) == len(expected)
            assert sum(work.num_jobs for work in store.work(selection)) == len(expected)
            failed = [name for name, _, _ in store.failures(selection)]
            assert failed == [name for name in expected if name in "bd"]

    @pytest.mark.usefixtures("filled")
    @pytest.mark.parametrize("by_ids", [False, True])
    @pytest.mark.parametrize(
        ("order", "expected"), [("submitted", "abcdef"), ("updated", "fedcba"), ("priority", "dbeacf")]
    )
    def test_pages_of_an_order_are_all_of_it(self, store, order, expected, by_ids):
        selection = Selection(ids=list("fbdeca")) if by_ids else Selection()
        assert "".join(job.id for job in store.jobs(selection, order=order)) == expected
        for size in (1, 2, 4, 6, 7):
            pages = [store.jobs(selection, order=order, limit=size, skip=skip) for skip in range(0, 8, size)]
            assert all(len(page) <= size for page in pages)
            assert "".join(job.id for page in pages for job in page) == expected
        assert "".join(job.id for job in store.jobs(selection, order=order, skip=4)) == expected[4:]

    @pytest.mark.usefixtures("filled")
    def test_failures_are_told_with_their_class(self, store):
        assert store.failures() == (("b", FailureClass.AUTH, "b failed"), ("d", FailureClass.BAD_INPUT, "d failed"))

    def test_many_ids_are_in_order_too(self, store, make_request):
        names = [f"r{index}" for index in range(1100)]
        store.submit([make_request(name, priority=index % 7) for index, name in enumerate(names)])
        selection = Selection(ids=names[::-1])
        assert [job.id for job in store.jobs(selection)] == names
        assert list(store.ids(selection)) == names
        expected = sorted(names, key=lambda name: (-(int(name[1:]) % 7), int(name[1:])))
        assert [job.id for job in store.jobs(selection, order="priority", limit=50, skip=500)] == expected[500:550]

    def test_work_is_told_by_base_and_stage(self, store, driver, make_request):
        store.submit([make_request("a"), make_request("b"), make_request("c", base="/models/other")])
        driver.lead_to("a", JobState.MERGING)
        found = {(work.base, work.state): work.num_jobs for work in store.work()}
        assert found == {
            ("/models/base", JobState.MERGING): 1,
            ("/models/base", JobState.QUEUED): 1,
            ("/models/other", JobState.QUEUED): 1,
        }

    def test_events_after_one(self, store, driver, make_request):
        store.submit([make_request("a")])
        driver.lead_to("a", JobState.MERGING)
        assert [event.sequence for event in store.events("a", after=2)] == [3, 4]
        assert store.events("a", after=4) == ()
