"""Submitting: twice, in bulk, with ids that are taken, to places that are."""

import time

import pytest
from sqlalchemy import event

from jobs.errors import BadInputError
from jobs.states import JobState
from tests.releases import settle


class TestSubmit:
    def test_jobs_are_queued_with_their_request_and_labels(self, store, driver, make_request):
        requests = [make_request("a", labels={"team": "x"}), make_request("b", priority=3)]
        result = store.submit(requests)
        assert result.created == ("a", "b")
        assert result.unchanged == ()
        one, two = store.jobs()
        assert (one.request, two.request) == tuple(requests)
        assert one.state is JobState.QUEUED
        assert (one.attempts, one.token, one.owner, one.release) == (0, 0, None, None)
        assert abs(one.created_at - time.time()) < 60
        assert driver.states("a") == [JobState.QUEUED]

    def test_again_is_a_no_op_whatever_became_of_the_job(self, store, driver, make_request):
        store.submit([make_request("a")])
        driver.lead_to("a", JobState.FAILED)
        before = driver.record("a"), store.events("a")
        result = store.submit([make_request("a"), make_request("b"), make_request("b")])
        assert result.created == ("b",)
        assert result.unchanged == ("a",)
        assert (driver.record("a"), store.events("a")) == before

    def test_all_conflicts_are_reported_and_nothing_is_submitted(self, store, make_request):
        store.submit([make_request("a"), make_request("b")])
        with pytest.raises(BadInputError) as caught:
            store.submit(
                [
                    make_request("new"),
                    make_request("a", priority=5, dtype="float16"),
                    make_request("c", destination="/releases/b"),
                    make_request("d", destination="/releases/d"),
                    make_request("e", destination="/releases/d"),
                ]
            )
        lines = str(caught.value).splitlines()
        assert len(lines) == 3
        assert "job 'a'" in lines[0]
        assert "another dtype, priority" in lines[0]
        assert "job 'c'" in lines[1]
        assert "job 'b'" in lines[1]
        assert "job 'e'" in lines[2]
        assert "job 'd'" in lines[2]
        assert [job.id for job in store.jobs()] == ["a", "b"]

    def test_a_destination_is_free_again_when_its_job_was_given_up(self, store, driver, make_request):
        store.submit([make_request("a")])
        driver.lead_to("a", JobState.FAILED)
        assert store.submit([make_request("b", destination="/releases/a")]).created == ("b",)
        with pytest.raises(BadInputError, match=r"job 'a'.* /releases/a, which belongs to job 'b'"):
            store.retry(["a"])
        assert driver.record("a").state is JobState.FAILED

    def test_a_published_destination_stays_taken(self, store, driver, make_request, make_release):
        store.submit([make_request("a")])
        settle(store, "a", driver.claim("a").token, make_release("a"), None)
        with pytest.raises(BadInputError, match="belongs to job 'a'"):
            store.submit([make_request("b", destination="/releases/a")])

    def test_thousands_at_once(self, store, make_request):
        requests = [make_request(f"r{index}") for index in range(3000)]
        assert len(store.submit(requests).created) == 3000
        assert len(store.submit(requests).unchanged) == 3000
        assert [job.id for job in store.jobs()] == [request.id for request in requests]

    def test_the_lock_is_held_for_as_few_statements_however_many_jobs_there_are(self, store, make_request):
        def statements(call, argument):
            seen = []
            listen = (store._database._engine, "before_cursor_execute", lambda *given: seen.append(given[2]))
            event.listen(*listen)
            call(argument)
            event.remove(*listen)
            return seen

        requests = [make_request(f"r{index}") for index in range(1200)]
        ids = [request.id for request in requests]
        submitted = statements(store.submit, requests)
        # A batch of ids is looked up by its index; what needs all live jobs asks once.
        assert sum("jobs.state" in each for each in submitted if each.startswith("SELECT")) == 1
        for verb in (store.cancel, store.retry):
            done = statements(verb, ids)
            # 500 jobs in each statement.
            writes = [each.split()[0] for each in done if not each.startswith(("SELECT", "BEGIN"))]
            assert writes == ["INSERT", "UPDATE"] * 3

    @pytest.mark.parametrize("state", [JobState.QUEUED, JobState.PUBLISHED])
    @pytest.mark.parametrize("root", ["s3://bucket/n", "/releases"])
    def test_destinations_inside_of_others_and_around_them_are_refused(
        self, store, driver, make_request, make_release, root, state
    ):
        store.submit([make_request("a", destination=f"{root}/n"), make_request("h", destination="hf://org/n")])
        if state is JobState.PUBLISHED:
            settle(store, "a", driver.lead_to("a", JobState.PUBLISHING), make_release("a"))
        with pytest.raises(BadInputError) as caught:
            store.submit(
                [
                    make_request("in", destination=f"{root}/n/prod"),
                    make_request("deep", destination=f"{root}/n/x/y"),
                    make_request("around", destination=root),
                    make_request("beside", destination=f"{root}/n-other"),
                    make_request("also", destination=f"{root}/n2"),
                    make_request("hub", destination="hf://org/n@v1"),
                ]
            )
        found = [line.partition(", found ")[2] for line in str(caught.value).splitlines()]
        inside = "which lies inside of"
        assert sorted(found) == sorted(
            [
                f"{root}/n/prod, {inside} {root}/n of job 'a'",
                f"{root}/n/prod, {inside} {root} of job 'around'",
                f"{root}/n/x/y, {inside} {root}/n of job 'a'",
                f"{root}/n/x/y, {inside} {root} of job 'around'",
                f"{root}/n-other, {inside} {root} of job 'around'",
                f"{root}/n2, {inside} {root} of job 'around'",
                f"{root}, inside of which lies {root}/n of job 'a'",
            ]
        )
        assert store.submit([make_request("beside", destination=f"{root}/n-other")]).created == ("beside",)

    def test_a_retry_does_not_go_inside_of_what_came_meanwhile(self, store, driver, make_request):
        store.submit([make_request("a", destination="s3://bucket/n/prod")])
        driver.lead_to("a", JobState.FAILED)
        store.submit([make_request("b", destination="s3://bucket/n")])
        with pytest.raises(BadInputError, match=r"job 'a'.* which lies inside of s3://bucket/n of job 'b'"):
            store.retry(["a"])
