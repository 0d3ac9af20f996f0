"""Drivers on Postgres that do things at the same moment: each one waits for the other, or passes over what it has."""

import functools
import threading

import pytest

from jobs.errors import FailureClass
from jobs.ledger.claims import Claim
from jobs.ledger.pauses import Scope
from jobs.ledger.shares import ShareRules
from jobs.ledger.store import JobStore
from jobs.states import JobState

pytestmark = pytest.mark.postgres


@pytest.fixture
def url(postgres_server):
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def store(url):
    store = JobStore(url)
    yield store
    store.close()


@pytest.fixture
def other(url, store):
    other = JobStore(url)
    assert store.ids() == other.ids()
    yield other
    other.close()


class TestAtTheSameMoment:
    """One driver is stopped in the middle of a transaction; the other one goes on, or waits for it."""

    def background(self, call):
        """Run a call in a thread; what it returned, or raised, comes when it is asked for."""
        result = []

        def run():
            try:
                result.append(call())
            except Exception as error:  # noqa: BLE001 - it is the result
                result.append(error)

        thread = threading.Thread(target=run)
        thread.start()

        def wait():
            thread.join(30)
            (got,) = result
            if isinstance(got, Exception):
                raise got
            return got

        return thread, wait

    @pytest.fixture
    def at_fault(self, store, make_request):
        store.submit([make_request(name, destination=f"s3://bucket/{name}") for name in "abcd"])
        (lease,) = store.claim("driver", 1, 60)
        self.meet(store, lease)
        assert store.claim("driver", 9, 60) == ()
        with store._database.write() as connection:
            connection.exec_driver_sql("UPDATE pauses SET probe_at = 1")

    def meet(self, store, lease):
        fault = {"failure": FailureClass.TRANSIENT_IO, "reason": "gone", "state": JobState.MERGING}
        pause = store.pause_place("s3://bucket", lease.job_id, by="x", first_seconds=9, max_seconds=9, **fault)
        store.let_go(lease.job_id, lease.token, "fault")
        return pause

    def test_two_that_meet_one_fault_make_one_pause(self, store, other, make_request, monkeypatch):
        store.submit([make_request(name, destination=f"s3://bucket/{name}") for name in "ab"])
        leases = store.claim("driver", 2, 60)
        entered, go = threading.Event(), threading.Event()
        now = store._database.now

        def slow(connection):
            entered.set()
            assert go.wait(30)
            return now(connection)

        monkeypatch.setattr(store._database, "now", slow)
        _, first = self.background(lambda: self.meet(store, leases[0]))
        assert entered.wait(30)
        thread, second = self.background(lambda: self.meet(other, leases[1]))
        thread.join(0.3)
        go.set()
        assert (first() is None, second() is None) == (False, True)
        (pause,) = store.pauses()
        assert pause.num_faults == 1

    @pytest.mark.usefixtures("at_fault")
    def test_a_place_is_tried_by_one_job(self, store, other):
        with store._database.write() as connection:
            connection.exec_driver_sql("SELECT * FROM pauses FOR NO KEY UPDATE")  # as a claim does that tries it
            assert other.claim("other", 9, 60) == ()
        ((_, is_probe),) = [(lease.job_id, lease.is_probe) for lease in other.claim("other", 9, 60)]
        assert is_probe
        assert store.claim("driver", 9, 60) == ()

    @pytest.mark.usefixtures("at_fault")
    @pytest.mark.parametrize("end", ["passed", "resumed", "resumed, a person's"])
    def test_a_pause_that_ends_during_a_claim_marks_no_job(self, store, other, make_request, monkeypatch, end):
        """Else a job would be held by a pause that is over, and so for ever."""
        place = "s3://bucket"
        if end == "passed":
            (probe,) = other.claim("other", 1, 60)
            call = functools.partial(other.passed, probe.job_id, JobState.PUBLISHED)
        else:
            if end != "resumed":
                store.resume(Scope.PLACE, place)
                place = "s3://bucket-2"
                store.pause(Scope.PLACE, place, "ann", "why")
            call = functools.partial(other.resume, Scope.PLACE, place)
        store.submit([make_request("new", destination=f"{place}/new")])  # no pause has marked it
        waits = []
        in_turn = Claim._in_turn

        def slow(claim, probes):
            """Let another driver end the pause once its jobs were met, and before this is committed."""
            taken = in_turn(claim, probes)
            thread, wait = self.background(call)
            waits.append(wait)
            thread.join(0.3)
            return taken

        monkeypatch.setattr(Claim, "_in_turn", slow)
        store.claim("driver", 9, 60)
        monkeypatch.undo()
        (wait,) = waits
        assert wait()
        assert store.pauses() == ()
        assert store.num_held() == {}
        store.claim("driver", 9, 60)
        assert {job.state for job in store.jobs()} == {JobState.LEASED}

    def test_two_that_claim_from_shares_for_the_first_time(self, store, other, make_request, monkeypatch):
        store.register_driver("driver", "host", 1, "team")
        store.submit([make_request(f"r{index}", labels={"team": "xy"[index % 2]}) for index in range(40)])
        rules = ShareRules(label="team")
        keep = []

        from jobs.ledger.claims import Claim

        original = Claim._keep

        def slow(claim, turns):
            if claim._owner == "driver":
                thread, wait = self.background(lambda: other.claim("other", 3, 60, rules))
                keep.append(wait)
                thread.join(0.3)
            original(claim, turns)

        monkeypatch.setattr(Claim, "_keep", slow)
        mine = {lease.job_id for lease in store.claim("driver", 3, 60, rules)}
        its = {lease.job_id for lease in keep[0]()}
        assert len(mine) == len(its) == 3
        assert mine.isdisjoint(its)

    def test_a_retry_and_a_purge(self, store, other, make_request):
        """A job that is retried while old ones are forgotten is not lost."""
        store.submit([make_request("a"), make_request("b")])
        store.cancel(["a", "b"])
        with other._database.write() as connection:
            other._database.lock_admission(connection)
            connection.exec_driver_sql("UPDATE jobs SET state = 'QUEUED' WHERE id = 'a'")  # as a retry does
            thread, purged = self.background(lambda: store.purge(-1))
            thread.join(0.3)
            assert thread.is_alive()
        assert purged() == (("b",), ())
        assert store.ids() == ("a",)

    def test_drivers_that_do_all_at_once_do_not_stop_each_other(self, store, url, make_request):
        """Claims, faults, passes, pauses, cancellations and submissions from four threads; nothing deadlocks."""
        store.submit([make_request(f"r{index}", destination=f"s3://bucket/{index}") for index in range(60)], "one")

        def act(number):
            mine = JobStore(url)
            try:
                for turn in range(25):
                    self.work(mine, f"driver-{number}", turn)
                    (self.steer, self.change_minds, self.submit_more, lambda *_: None)[number](mine, turn, make_request)
            finally:
                mine.close()

        for _, wait in [self.background(functools.partial(act, number)) for number in range(4)]:
            wait()
        store.resume(Scope.PLACE, "s3://bucket")
        assert store.pauses() == ()
        assert store.num_held() == {}
        waiting = {job.id for job in store.jobs() if job.state is JobState.QUEUED}
        assert len(waiting) > 60
        assert {lease.job_id for lease in store.claim("last", 999, 60)} == waiting

    def work(self, store, owner, turn):
        for lease in store.claim(owner, 3, 60):
            if turn % 3 == 0:
                self.meet(store, lease)
            else:
                store.let_go(lease.job_id, lease.token, "drain")
                if lease.is_probe:
                    store.passed(lease.job_id, JobState.PUBLISHED)

    def steer(self, store, _turn, _make_request):
        store.pause(Scope.BATCH, "one", "ann", "why")
        store.resume(Scope.BATCH, "one")
        store.resume(Scope.PLACE, "s3://bucket")

    def change_minds(self, store, turn, _make_request):
        names = [f"r{(turn * 7 + step) % 60}" for step in range(9)]
        store.cancel(names)
        store.retry(names)

    def submit_more(self, store, turn, make_request):
        store.submit([make_request(f"n{turn}", destination=f"s3://bucket/n{turn}")], "two")
