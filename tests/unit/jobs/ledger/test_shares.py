"""Fair shares: weights, quotas, and shares that were idle; on their own, and in claims of a ledger."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import FailureClass
from jobs.ledger.shares import ShareRules, Turns
from jobs.ledger.store import JobStore
from jobs.states import Decision, JobState

rng = random.Random(7)


def turns(**rules):
    return Turns(ShareRules(label="team", **rules), virtual_times={}, clock=0.0, at_work={})


def endless(name):
    while True:
        yield name


class TestTurns:
    def test_each_share_gets_its_weight_within_a_job_or_two(self):
        weights = {"a": 3.0, "b": 1.0, "c": 0.5}
        queue = turns(weights=weights)
        got = Counter()
        for _ in range(900):
            got.update(queue.take({name: endless(name) for name in weights}, 1))
            total = sum(got.values())
            for name, weight in weights.items():
                assert abs(got[name] - total * weight / 4.5) <= 2
        assert got == {"a": 600, "b": 200, "c": 100}

    @given(
        weights=st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10), min_size=2),
        limits=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    )
    def test_no_two_that_always_wait_drift_apart(self, weights, limits):
        """|W_i / w_i - W_j / w_j| <= 1 / w_i + 1 / w_j: theorem 1 of the paper, for jobs of cost 1."""
        queue = turns(weights=weights)
        got = Counter()
        for limit in limits:
            got.update(queue.take({name: endless(name) for name in weights}, limit))
            for one, its in weights.items():
                for other, others in weights.items():
                    assert abs(got[one] / its - got[other] / others) <= 1 / its + 1 / others + 1e-6
        assert sum(got.values()) == sum(limits)

    def test_a_share_that_was_idle_has_no_credit(self):
        queue = turns()
        queue.take({"busy": endless("busy")}, 1000)
        got = queue.take({"busy": endless("busy"), "idle": endless("idle")}, 20)
        assert abs(got.count("idle") - 10) <= 1

    def test_a_share_that_has_nothing_leaves_its_turns_to_others(self):
        assert turns().take({"a": iter([]), "b": iter("bb"), "c": iter("c")}, 9) == ["b", "c", "b"]

    def test_a_quota_bounds_what_is_at_work(self):
        queue = Turns(ShareRules(label="team", quotas={"a": 3, "b": 0}), {}, 0.0, {"a": 1})
        got = queue.take({name: endless(name) for name in "abc"}, 10)
        assert Counter(got) == {"a": 2, "c": 8}
        assert queue.take({"a": endless("a"), "b": endless("b")}, 10) == []


@pytest.fixture
def rules():
    return ShareRules(label="team", weights={"x": 3.0, "y": 1.0})


@pytest.fixture
def fill(store, make_request):
    """Submit jobs of teams: how many of each."""
    numbers = Counter()

    def fill(*, priority=lambda: 0, **teams):
        requests = []
        for team, count in teams.items():
            for _ in range(count):
                numbers[team] += 1
                labels = {} if team == "none" else {"team": team}
                requests.append(make_request(f"{team}{numbers[team]}", labels=labels, priority=priority()))
        store.submit(requests)

    store.register_driver("driver", "host", 1, "team")
    return fill


def end(store, leases):
    gone = Decision(state=JobState.FAILED)
    for lease in leases:
        store.fail(lease.job_id, lease.token, FailureClass.BAD_INPUT, "no", gone)


class TestClaims:
    def test_shares_get_jobs_as_they_weigh_whatever_the_size_of_claims(self, store, fill, rules):
        fill(x=330, y=120, priority=lambda: rng.randrange(3))
        got = Counter()
        while sum(got.values()) < 400:
            leases = store.claim("driver", rng.choice([1, 1, 2, 5, 17]), 60, rules)
            got.update(lease.share for lease in leases)
            total = sum(got.values())
            assert abs(got["x"] - total * 3 / 4) <= 2
        assert total >= 400

    def test_it_goes_on_where_another_driver_left_it(self, store, store_url, fill, rules):
        fill(x=40, y=40)
        other = JobStore(store_url)
        got = Counter()
        for number in range(16):
            (lease,) = (store, other)[number % 2].claim(f"driver-{number % 2}", 1, 60, rules)
            got[lease.share] += 1
        other.close()
        assert got == {"x": 12, "y": 4}

    def test_a_share_that_was_idle_gains_no_credit(self, store, fill, rules):
        fill(x=60)
        for _ in range(6):
            store.claim("driver", 10, 60, rules)
        fill(x=40, y=40)
        got = Counter(lease.share for lease in store.claim("driver", 40, 60, rules))
        assert abs(got["x"] - 30) <= 1

    def test_a_quota_bounds_what_is_at_work_at_one_time(self, store, fill):
        rules = ShareRules(label="team", quotas={"x": 2, "y": 0})
        fill(x=5, y=5, none=5)
        first = store.claim("driver", 4, 60, rules)
        assert Counter(lease.share for lease in first) == {"x": 2, "": 2}
        assert Counter(lease.share for lease in store.claim("other", 9, 60, rules)) == {"": 3}
        assert store.claim("driver", 9, 60, rules) == ()
        end(store, [lease for lease in first if lease.share == "x"][:1])
        assert [lease.share for lease in store.claim("driver", 9, 60, rules)] == ["x"]
        assert store.claim("driver", 9, 60, rules) == ()

    def test_priority_and_age_count_inside_of_a_share_only(self, store, fill, make_request):
        fill(x=2, y=2)
        store.submit([make_request("x-high", labels={"team": "x"}, priority=1000)])
        got = [lease.job_id for lease in store.claim("driver", 4, 60, ShareRules(label="team"))]
        assert [name for name in got if name[0] == "x"] == ["x-high", "x1"]
        assert [name for name in got if name[0] == "y"] == ["y1", "y2"]

    def test_without_a_label_all_jobs_are_one_share(self, store, fill, make_request):
        store.register_driver("other", "host", 2, "")
        fill(x=2, y=2)
        store.submit([make_request("high", labels={"team": "z"}, priority=1)])
        assert {job.share for job in store.jobs()} == {""}
        assert [lease.job_id for lease in store.claim("driver", 5, 60)] == ["high", "x1", "x2", "y1", "y2"]

    def test_another_label_gives_jobs_other_shares(self, store, driver, fill, make_request):
        fill(x=1)
        store.submit([make_request("z", labels={"team": "z", "tier": "gold"})])
        store.submit([make_request("done", labels={"tier": "tin"}, priority=1)])
        driver.lead_to("done", JobState.FAILED)
        assert {job.id: job.share for job in store.jobs()} == {"x1": "x", "z": "z", "done": ""}
        store.register_driver("again", "host", 2, "team")
        assert driver.record("z").share == "z"
        store.register_driver("other", "host", 3, "tier")
        store.submit([make_request("new", labels={"team": "n", "tier": "gold"})])
        store.retry(["done"])
        shares = {"x1": "", "z": "gold", "new": "gold", "done": "tin"}
        assert {job.id: job.share for job in store.jobs()} == shares
        got = store.claim("driver", 9, 60, ShareRules(label="tier", quotas={"gold": 1}))
        assert Counter(lease.share for lease in got) == {"gold": 1, "": 1, "tin": 1}

    def test_a_driver_that_knows_of_no_shares_leaves_none_behind(self, store, fill):
        """As it was started before another one that makes shares, and has since ended."""
        fill(x=3, y=3)
        assert len(store.claim("older", 9, 60)) == 6

    def test_a_place_is_tried_within_the_quota(self, store, driver, fill, make_request):
        request = make_request("p", labels={"team": "x"}, destination="s3://bucket/p", priority=1)
        store.submit([request])
        token = driver.claim("p").token
        fault = {"failure": FailureClass.TRANSIENT_IO, "reason": "gone", "state": JobState.MERGING}
        store.pause_place("s3://bucket", "p", by="driver", first_seconds=1, max_seconds=1, **fault)
        store.let_go("p", token, "fault")
        assert store.claim("driver", 1, 60, ShareRules(label="team")) == ()
        fill(x=5)
        driver.probe_now()
        got = store.claim("driver", 9, 60, ShareRules(label="team", quotas={"x": 3}))
        assert [(lease.job_id, lease.is_probe) for lease in got] == [("p", True), ("x1", False), ("x2", False)]
