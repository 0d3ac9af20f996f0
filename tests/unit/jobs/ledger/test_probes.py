"""Places at fault, and the jobs that find out whether they work again."""

import pytest
from sqlalchemy import update

from jobs.errors import FailureClass
from jobs.ledger.pauses import Scope
from jobs.ledger.records import Fault
from jobs.ledger.schema import jobs, pauses
from jobs.states import Decision, JobState
from tests.releases import begin, settle

BUCKET, HUB = "s3://releases", "hf://"


def fault_of(place):
    return Fault(place=place, failure=FailureClass.TRANSIENT_IO, message="gone")


@pytest.fixture
def meet(store):
    """A job meets a fault of a place, and is given back, as a driver does it."""

    def meet(job_id, token, place, state=JobState.PUBLISHING, first=2.0, longest=300.0):
        pause = store.pause_place(
            place,
            job_id,
            by="driver",
            failure=FailureClass.TRANSIENT_IO,
            reason="gone",
            state=state,
            first_seconds=first,
            max_seconds=longest,
        )
        store.let_go(job_id, token, f"{place} is at fault", fault_of(place))
        return pause

    return meet


@pytest.fixture
def submit(store, make_request):
    def submit(*names, batch="default", **fields):
        store.submit([make_request(name, **{"destination": f"{BUCKET}/{name}"} | fields) for name in names], batch)

    return submit


@pytest.fixture
def at_fault(store, driver, submit, meet):
    """A bucket at fault, with five jobs that wait for it: the first has met the fault."""
    submit("a", "b", "c", "d", "e")
    token = driver.begin("a")
    assert store.advance({"a": token}, JobState.PUBLISHING) == {}
    assert meet("a", token, BUCKET).num_faults == 1
    assert store.claim("driver", 9, 60) == ()


def claim(store, limit=9, owner="driver"):
    return [(lease.job_id, lease.is_probe) for lease in store.claim(owner, limit, 60)]


def probe_of(store, place=BUCKET):
    return {pause.name: pause.probe for pause in store.pauses()}[place]


@pytest.mark.usefixtures("at_fault")
class TestProbe:
    def test_one_job_goes_ahead_when_it_is_due(self, store, driver):
        assert claim(store) == []
        driver.probe_now()
        assert claim(store) == [("b", True)]
        assert probe_of(store) == "b"
        for owner in ("driver", "other"):
            assert claim(store, owner=owner) == []

    def test_it_goes_beside_what_is_not_covered(self, store, driver, make_request):
        store.submit([make_request(f"free{index}") for index in range(3)])
        driver.probe_now()
        assert claim(store, limit=2) == [("b", True), ("free0", False), ("free1", False)]

    def test_the_one_that_was_excused_least_goes_first(self, store, driver):
        with store._database.write() as connection:
            for name, excused in (("a", 3), ("b", 2), ("c", 1), ("d", 1), ("e", 2)):
                connection.execute(update(jobs).where(jobs.c.id == name).values(excused_faults=excused))
            connection.execute(update(jobs).where(jobs.c.id == "d").values(priority=5))
            connection.execute(update(jobs).where(jobs.c.id == "a").values(priority=9))
        driver.probe_now()
        assert claim(store) == [("d", True)]

    def test_what_waits_for_its_own_time_does_not_go(self, store, driver, submit, meet):
        store.cancel(["b", "c", "d", "e"])
        store.resume(Scope.PLACE, BUCKET)
        later = Decision(state=JobState.RETRY_WAIT, delay_seconds=100)
        store.fail("a", driver.begin("a"), FailureClass.INTERNAL, "x", later)
        submit("f", "g")
        meet("f", driver.begin("f"), BUCKET)
        store.cancel(["f", "g"])
        driver.probe_now()
        assert claim(store) == []
        store.retry(["a"])
        assert claim(store) == []  # it is marked first
        assert claim(store) == [("a", True)]

    def test_a_place_that_is_still_at_fault_rests_for_twice_as_long(self, store, driver, meet):
        rests = []
        for _ in range(6):
            driver.probe_now()
            ((name, is_probe),) = claim(store)
            assert is_probe
            now = store.now()
            token = driver.record(name).token
            pause = meet(name, token, BUCKET, first=2, longest=20)
            rests.append(round(pause.probe_at - now))
            assert pause.probe is None
            assert claim(store) == []
        assert rests == [4, 8, 16, 20, 20, 20]
        assert pause.num_faults == 7

    def test_the_fault_of_a_job_that_was_at_work_before_is_no_news(self, store, driver, meet, make_request):
        store.submit([make_request("late", priority=1)])
        token = driver.begin("late")
        before = store.pauses()
        assert meet("late", token, BUCKET) is None
        assert store.pauses() == before

    @pytest.mark.parametrize("state", [JobState.PLANNING, JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING])
    def test_only_who_gets_further_than_the_fault_has_passed(self, store, driver, state):
        driver.probe_now()
        claim(store)
        assert store.passed("b", state) == ()
        assert store.passed("c", JobState.PUBLISHED) == ()  # was not sent
        assert claim(store) == []
        (ended,) = store.passed("b", JobState.PUBLISHED)
        assert ended.name == BUCKET
        assert store.pauses() == ()
        assert sorted(claim(store)) == [(name, False) for name in "acde"]

    @pytest.mark.parametrize("met_in", [None, JobState.LEASED, JobState.PLANNING, JobState.MERGING])
    def test_how_far_the_fault_was_is_what_counts(self, store, driver, met_in):
        with store._database.write() as connection:
            connection.execute(update(pauses).values(state=met_in))
        driver.probe_now()
        claim(store)
        if met_in in (JobState.PLANNING, JobState.MERGING):
            assert store.passed("b", met_in) == ()
        assert len(store.passed("b", JobState.VERIFYING)) == 1

    def test_one_that_ends_otherwise_is_followed_by_another(self, store, driver):
        driver.probe_now()
        claim(store)
        store.fail("b", 1, FailureClass.BAD_INPUT, "no", Decision(state=JobState.FAILED))
        store.probe_ended("b")
        assert claim(store) == [("c", True)]

    @pytest.mark.parametrize("end", ["cancelled", "failed", "published", "let go", "deleted"])
    def test_one_that_has_ended_without_a_word_blocks_nothing(self, store, driver, make_release, end):
        driver.probe_now()
        claim(store)
        begin(store, "b", 1)
        if end == "cancelled":
            store.cancel(["b"])
            store.let_go("b", 1, "stopped")
        elif end == "published":
            settle(store, "b", 1, make_release("b"))
        elif end == "let go":
            store.let_go("b", 1, "the driver stopped")
        else:
            store.fail("b", 1, FailureClass.BAD_INPUT, "no", Decision(state=JobState.FAILED))
        if end == "deleted":
            assert store.purge(-1) == (("b",), ())
        assert claim(store) == [("c", True)]
        assert probe_of(store) == "c"

    def test_one_that_is_lost_with_its_driver_is_followed_by_another(self, store, driver):
        driver.probe_now()
        claim(store)
        begin(store, "b", 1)
        driver.expire("b")
        assert claim(store, owner="other") == [("c", True)]
        assert (driver.record("b").state, driver.record("b").held_by) == (JobState.QUEUED, f"place {BUCKET}")

    def test_the_only_one_that_is_lost_with_its_driver_goes_again(self, store, driver):
        store.cancel(["a", "c", "d", "e"])
        driver.probe_now()
        assert claim(store) == [("b", True)]
        driver.expire("b")
        assert [*claim(store, owner="other"), *claim(store, owner="other")] == [("b", True)]

    def test_one_that_is_asked_to_stop_is_still_the_one(self, store, driver):
        driver.probe_now()
        claim(store)
        store.cancel(["b"])
        assert claim(store) == []

    def test_a_job_that_comes_meanwhile_tries_a_place_without_others(self, store, driver, submit):
        store.cancel("abcde")
        submit("new")
        driver.probe_now()
        assert claim(store) == []  # it is marked first
        assert claim(store) == [("new", True)]


class TestSeveralPlaces:
    @pytest.fixture
    def both(self, store, submit, meet):
        """The bucket and the Hub at fault; all jobs need both."""
        submit("a", "b", "c", adapter="hf://org/x")
        tokens = {lease.job_id: lease.token for lease in store.claim("driver", 2, 60)}
        meet("a", tokens["a"], BUCKET)
        meet("b", tokens["b"], HUB, state=JobState.PLANNING)
        assert claim(store) == []

    def due(self, store, place):
        with store._database.write() as connection:
            connection.execute(update(pauses).where(pauses.c.name == place).values(probe_at=1))

    @pytest.mark.usefixtures("both")
    @pytest.mark.parametrize("first", [BUCKET, HUB])
    def test_what_needs_both_tries_both_when_both_are_due(self, store, first):
        self.due(store, first)
        assert claim(store) == []
        self.due(store, {BUCKET: HUB, HUB: BUCKET}[first])
        assert claim(store) == [("c", True)]
        assert (probe_of(store, BUCKET), probe_of(store, HUB)) == ("c", "c")
        assert [pause.name for pause in store.passed("c", JobState.MERGING)] == [HUB]
        assert claim(store) == []
        assert [pause.name for pause in store.passed("c", JobState.PUBLISHED)] == [BUCKET]
        assert sorted(claim(store)) == [("a", False), ("b", False)]

    @pytest.mark.usefixtures("both")
    @pytest.mark.parametrize("place", [BUCKET, HUB])
    def test_one_that_fails_again_does_not_block_the_other(self, store, driver, meet, place):
        """The job that was sent to try both is given back by one: it is the other's no more."""
        for _ in range(4):
            driver.probe_now()
            ((name, is_probe),) = claim(store)
            assert is_probe
            assert meet(name, driver.record(name).token, place) is not None
        driver.probe_now()
        ((name, _),) = claim(store)
        assert {pause.name for pause in store.passed(name, JobState.PUBLISHED)} == {BUCKET, HUB}

    def test_each_has_its_own_where_jobs_need_one_of_them(self, store, driver, submit, meet, make_request):
        submit("a", "b")
        store.submit([make_request(name, adapter="hf://org/x") for name in ("c", "d")])
        tokens = {lease.job_id: lease.token for lease in store.claim("driver", 9, 60)}
        for name, token in tokens.items():
            meet(name, token, BUCKET if name in "ab" else HUB)
        assert claim(store) == []
        driver.probe_now()
        assert sorted(claim(store)) == [("a", True), ("c", True)]
        assert claim(store) == []

    def test_what_a_person_has_paused_does_not_go_and_others_do(self, store, driver, submit, meet):
        """More jobs than a claim looks at are behind the person's pause, and were behind the fault's before."""
        submit(*(f"r{index}" for index in range(600)), batch="paused")
        submit("z")
        meet("r0", driver.claim("r0").token, BUCKET)
        store.pause(Scope.BATCH, "paused", "ann", "why")
        driver.probe_now()
        assert [*claim(store), *claim(store)] == [("z", True)]
        assert store.num_held() == {"batch paused": 600}
        store.passed("z", JobState.PUBLISHED)
        assert claim(store) == []
        assert store.seconds_until_due() is not None  # z is at work
        store.resume(Scope.BATCH, "paused")
        assert len(claim(store, limit=1000)) == 600


class TestNodes:
    def test_a_machine_is_tried_by_the_job_that_its_driver_names(self, store, driver, submit, meet):
        submit("a", "b")
        assert meet("a", driver.claim("a").token, "node:x").num_faults == 1
        assert sorted(claim(store)) == [("a", False), ("b", False)]  # no job needs one machine
        store.send_probe("node:x", "b")
        assert probe_of(store, "node:x") == "b"
        assert meet("b", 1, "node:x").num_faults == 2
        assert claim(store) == [("b", False)]
        store.send_probe("node:x", "b")
        assert [pause.name for pause in store.passed("b", JobState.PUBLISHED)] == ["node:x"]

    def test_one_that_is_lost_does_not_keep_the_machine_resting(self, store, driver, submit, meet):
        submit("a", "b")
        meet("a", driver.claim("a").token, "node:x")
        claim(store)
        store.send_probe("node:x", "b")
        driver.expire("b")
        claim(store, owner="other")
        assert probe_of(store, "node:x") is None
