"""Batches, deadlines, drivers and what is old: what a queue is steered by beside pauses and shares."""

import datetime as dt
import fcntl
import signal
import subprocess
import sys

import pytest
from sqlalchemy import update

from jobs.errors import BadInputError, FailureClass
from jobs.ledger.schema import batches, drivers, events, jobs, labels, releases
from jobs.ledger.store import JobStore
from jobs.states import Decision, JobState
from tests.releases import settle


def at(seconds):
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC)


class TestBatches:
    def test_they_are_made_by_submissions_and_count_their_jobs(self, store, driver, make_request):
        assert store.batches() == ()
        assert store.submit([make_request("a"), make_request("b")], "night").batch == "night"
        store.submit([make_request("c")], "day")
        store.submit([make_request("d")])
        store.submit([make_request("e")], "night")
        driver.lead_to("a", JobState.MERGING)
        store.cancel(["b"])
        found = {
            batch.name: {state: count for state, count in batch.counts.items() if count} for batch in store.batches()
        }
        assert found == {
            "night": {JobState.MERGING: 1, JobState.CANCELLED: 1, JobState.QUEUED: 1},
            "day": {JobState.QUEUED: 1},
            "default": {JobState.QUEUED: 1},
        }
        assert [batch.name for batch in store.batches()] == ["night", "day", "default"]
        assert all(set(batch.counts) == set(JobState) for batch in store.batches())

    def test_a_job_stays_in_the_batch_it_came_in(self, store, driver, make_request):
        store.submit([make_request("a")], "first")
        result = store.submit([make_request("a"), make_request("b")], "second")
        assert (result.batch, result.created, result.unchanged) == ("second", ("b",), ("a",))
        assert (driver.record("a").batch, driver.record("b").batch) == ("first", "second")

    def test_nothing_new_makes_no_batch(self, store, make_request):
        store.submit([make_request("a")], "first")
        store.submit([make_request("a")], "second")
        assert [batch.name for batch in store.batches()] == ["first"]

    def test_a_refused_submission_makes_none(self, store, make_request):
        store.submit([make_request("a")], "first")
        with pytest.raises(BadInputError):
            store.submit([make_request("b", destination="/releases/a")], "second")
        assert [batch.name for batch in store.batches()] == ["first"]


class TestDeadlines:
    def test_what_waits_too_long_fails_and_what_is_at_work_goes_on(self, store, driver, make_request):
        now = store.now()
        names = ("soon", "waits", "work", "held", "late", "none")
        store.submit([make_request(name, deadline=None if name == "none" else at(now + 1000)) for name in names])
        tokens = {name: driver.claim(name).token for name in ("soon", "waits", "work")}
        store.let_go("soon", tokens["soon"], "drain")
        again = Decision(state=JobState.RETRY_WAIT, delay_seconds=9999)
        store.fail("waits", tokens["waits"], FailureClass.TRANSIENT_IO, "x", again)
        with store._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == "held").values(held_by="place s3://x"))
            connection.execute(update(jobs).where(jobs.c.id.not_in(["late", "none"])).values(deadline=now - 1))
        assert [lease.job_id for lease in store.claim("driver", 9, 60)] == ["late", "none"]
        for name in ("soon", "waits", "held"):
            job = driver.record(name)
            assert (job.state, job.failure_class) == (JobState.FAILED, FailureClass.DEADLINE_PASSED)
            assert "deadline passed before work on it began" in job.failure_message
            assert (job.held_by, job.not_before) == ("", None)
            assert store.events(name)[-1].detail["failure"] == "deadline_passed"
        assert driver.record("work").state is JobState.LEASED
        assert store.extend("driver", {"work": tokens["work"]}, 60) == frozenset()
        driver.expire("work")
        assert store.claim("driver", 9, 60) == ()
        assert driver.record("work").state is JobState.FAILED

    def test_it_is_looked_at_on_the_clock_of_the_store(self, store, driver, make_request):
        now = store.now()
        store.submit([make_request("past", deadline=at(now - 0.5)), make_request("coming", deadline=at(now + 300))])
        assert [lease.job_id for lease in store.claim("driver", 9, 60)] == ["coming"]
        assert driver.record("past").state is JobState.FAILED


class TestDrivers:
    def test_they_are_known_until_they_end_and_hold_nothing(self, store, make_request):
        store.submit([make_request("a"), make_request("b")])
        store.register_driver("one", "host-1", 11, "")
        store.register_driver("two", "host-2", 22, "")
        store.claim("one", 1, 600)
        first, second = store.drivers()
        assert (first.owner, first.host, first.pid, first.num_leases, first.ended_at) == ("one", "host-1", 11, 1, None)
        assert (second.owner, second.num_leases) == ("two", 0)
        store.see_driver("one")
        assert store.drivers()[0].seen_at > first.seen_at
        store.see_driver("one", ended=True)
        store.see_driver("two", ended=True)
        (left,) = store.drivers()
        assert (left.owner, left.num_leases) == ("one", 1)
        assert left.ended_at is not None
        store.release_leases("one")
        store.claim("three", 1, 600)
        assert store.drivers() == ()


class TestPurge:
    def test_only_what_ended_long_ago_is_forgotten(self, store, driver, make_request, make_release):
        names = ("published", "failed", "cancelled", "recent", "work", "waits")
        for name in names:
            store.submit([make_request(name, labels={"team": "x"})], f"batch-{name}")
        settle(store, "published", driver.claim("published").token, make_release("published"), "/reports/p")
        token = driver.claim("failed").token
        gone = Decision(state=JobState.FAILED)
        store.fail("failed", token, FailureClass.AUTH, "no", gone, report_path="/reports/f")
        store.cancel(["cancelled"])
        settle(store, "recent", driver.claim("recent").token, make_release("recent"), "/reports/r")
        driver.claim("work")
        for owner in ("ended", "alive"):
            store.register_driver(owner, "host", 1, "")
        store.see_driver("ended", ended=True)
        now = store.now()
        with store._database.write() as connection:
            old = jobs.c.id != "recent"
            connection.execute(update(jobs).where(old).values(updated_at=now - 1000))
            connection.execute(update(batches).values(created_at=now - 1000))
            connection.execute(update(drivers).values(ended_at=now - 1000).where(drivers.c.owner == "ended"))
        expected = (("published", "failed", "cancelled"), ("/reports/p", "/reports/f"))
        before = store.jobs()
        assert store.purge(900, dry_run=True) == expected
        assert store.jobs() == before
        assert len(store.batches()) == 6
        assert store.purge(1100) == ((), ())
        assert store.purge(900) == expected
        assert store.ids() == ("recent", "work", "waits")
        assert {batch.name for batch in store.batches()} == {"batch-recent", "batch-work", "batch-waits"}
        assert [record.owner for record in store.drivers()] == ["alive"]
        for table in (events, labels, releases):
            with store._database.read() as connection:
                assert {row.job_id for row in connection.execute(table.select())} <= {"recent", "work", "waits"}
        assert store.events("published") == ()
        assert store.submit([make_request("published")], "again").created == ("published",)

    def test_an_empty_batch_that_is_new_stays(self, store, make_request):
        store.submit([make_request("a")], "one")
        store.cancel(["a"])
        with store._database.write() as connection:
            connection.execute(update(jobs).values(updated_at=1))
        store.purge(900)
        assert [(batch.name, sum(batch.counts.values())) for batch in store.batches()] == [("one", 0)]


HOLDER = """
import sys
from jobs.ledger.store import JobStore
with JobStore(sys.argv[1]).one_driver("driver-1 on host, process 11"):
    print("held", flush=True)
    sys.stdin.readline()
"""


class TestOneDriver:
    @pytest.fixture
    def holder(self, database):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, f"sqlite:///{database}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()
        process.communicate()

    def test_a_second_one_is_refused_with_the_name_of_the_first(self, sqlite_store, holder, make_request):
        refused = r"has a driver already: driver-1 on host, process 11\. .* one in Postgres \(MERGEFLEET_STORE="
        with pytest.raises(BadInputError, match=refused), sqlite_store.one_driver("driver-2"):
            pass
        assert sqlite_store.submit([make_request("a")]).created == ("a",)  # people go on
        holder.communicate("end\n", timeout=30)
        with sqlite_store.one_driver("driver-2"):
            pass

    def test_the_kernel_frees_the_place_of_one_that_is_killed(self, sqlite_store, holder, database):
        with (database.parent / "jobs.db-driver").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        again = JobStore(f"sqlite:///{database}")
        refused = pytest.raises(BadInputError, match="has a driver already: driver-2")
        with sqlite_store.one_driver("driver-2"), refused, again.one_driver("driver-3"):
            pass
        again.close()

    @pytest.mark.postgres
    def test_a_server_takes_several(self, postgres_server):
        with postgres_server.database() as url:
            one, two = JobStore(url), JobStore(url)
            with one.one_driver("driver-1"), two.one_driver("driver-2"):
                pass
            one.close()
            two.close()
