"""What is paused, by people and for faults of places, and what that keeps from being claimed."""

import pytest

from jobs.errors import BadInputError, FailureClass, NotFoundError
from jobs.ledger.pauses import Cause, Scope, check_scope
from jobs.states import JobState
from tests.releases import settle

# Jobs, what differs from /models/base, /adapters/<id>, /releases/<id>, and the batch of each.
JOBS = {
    "bucket": ({"destination": "s3://releases/bucket"}, "one"),
    "reads-bucket": ({"adapter": "s3://adapters/x"}, "one"),
    "hub": ({"adapter": "hf://org/adapter"}, "one"),
    "base": ({"base": "/models/other"}, "one"),
    "directory": ({"destination": "/mnt/out/x"}, "two"),
    "beside": ({"destination": "/mnt/out-2/x"}, "two"),
    "capital": ({"destination": "/MNT/out/x"}, "two"),
    "combined": (
        {
            "adapter": None,
            "adapters": [{"adapter": "/adapters/a"}, {"adapter": "s3://adapters/y"}],
            "combination": {"type": "linear"},
        },
        "two",
    ),
}
COVERED = [
    (Scope.QUEUE, "", set(JOBS)),
    (Scope.BATCH, "one", {"bucket", "reads-bucket", "hub", "base"}),
    (Scope.BASE, "/models/other", {"base"}),
    (Scope.PLACE, "s3://releases", {"bucket"}),
    (Scope.PLACE, "s3://adapters", {"reads-bucket", "combined"}),
    (Scope.PLACE, "s3://other", set()),
    (Scope.PLACE, "hf://", {"hub"}),
    (Scope.PLACE, "file:///mnt/out", {"directory"}),
    (Scope.PLACE, "file:///mnt/out/x", {"directory"}),
    (Scope.PLACE, "file:///models", set(JOBS)),
    (Scope.PLACE, "file:///", set(JOBS)),
    (Scope.PLACE, "node:10.0.0.7", set()),
]
FAULT = {"failure": FailureClass.TRANSIENT_IO, "state": JobState.PUBLISHING, "first_seconds": 100, "max_seconds": 500}


@pytest.fixture
def requests(make_request):
    return {name: make_request(name, **fields) for name, (fields, _) in JOBS.items()}


@pytest.fixture
def submit(store, requests):
    def submit(names=tuple(JOBS)):
        for name in names:
            store.submit([requests[name]], JOBS[name][1])

    return submit


def claim(store, limit=20):
    return {lease.job_id for lease in store.claim("driver", limit, 60)}


class TestScopes:
    @pytest.mark.parametrize(("scope", "name", "covered"), COVERED)
    def test_what_waits_and_is_covered_is_held_until_it_is_let_go(self, store, submit, scope, name, covered):
        submit()
        assert store.pause(scope, name, "ann", "maintenance")
        assert not store.pause(scope, name, "bob", "again")
        (pause,) = store.pauses()
        assert (pause.scope, pause.name, pause.cause, pause.by, pause.reason) == (
            scope,
            name,
            Cause.OPERATOR,
            "ann",
            "maintenance",
        )
        assert claim(store) == set(JOBS) - covered
        if scope is not Scope.QUEUE:
            assert store.num_held() == ({f"{scope} {name}": len(covered)} if covered else {})
            assert {job.id for job in store.jobs() if job.held_by} == covered
        assert claim(store) == set()
        assert store.resume(scope, name) == (pause,)
        assert store.resume(scope, name) == ()
        assert store.num_held() == {}
        assert claim(store) == covered

    @pytest.mark.parametrize(("scope", "name", "covered"), COVERED)
    def test_jobs_submitted_during_the_pause_are_held_as_well(self, store, submit, scope, name, covered):
        first = next(iter(JOBS))
        if scope is not Scope.BASE:
            submit([first])
            store.pause(scope, name, "ann", "why")
            submit()
        else:  # a base is known by its jobs
            submit()
            store.cancel(["base"])
            store.pause(scope, name, "ann", "why")
            store.retry(["base"])
        assert claim(store) == set(JOBS) - covered
        store.resume(scope, name)
        assert claim(store) == covered

    @pytest.mark.parametrize(("scope", "name", "covered"), COVERED)
    @pytest.mark.parametrize("way", ["let_go", "expire", "retry"])
    def test_jobs_given_back_during_the_pause_are_held_as_well(self, store, driver, submit, scope, name, covered, way):
        submit()
        tokens = {lease.job_id: lease.token for lease in store.claim("driver", 20, 60)}
        assert tokens.keys() == JOBS.keys()
        store.pause(scope, name, "ann", "why")
        for job_id, token in tokens.items():
            if way == "let_go":
                store.let_go(job_id, token, "drain")
            elif way == "expire":
                driver.expire(job_id)
        if way == "retry":
            store.cancel(JOBS)
            for job_id, token in tokens.items():
                store.let_go(job_id, token, "stopped")
            store.retry(JOBS)
        assert claim(store) == set(JOBS) - covered
        store.resume(scope, name)
        assert claim(store) == covered

    def test_jobs_at_work_go_on(self, store, driver, submit):
        submit(["bucket"])
        token = driver.begin("bucket")
        store.pause(Scope.QUEUE, "", "ann", "why")
        store.pause(Scope.PLACE, "s3://releases", "ann", "why")
        assert store.advance({"bucket": token}, JobState.PUBLISHING) == {}
        assert store.extend("driver", {"bucket": token}, 60) == frozenset()

    def test_what_is_held_by_two_waits_for_both(self, store, submit):
        submit(["bucket", "hub"])
        store.pause(Scope.PLACE, "s3://releases", "ann", "why")
        store.pause(Scope.BATCH, "one", "ann", "why")
        store.resume(Scope.PLACE, "s3://releases")
        assert claim(store) == set()
        store.resume(Scope.BATCH, "one")
        assert claim(store) == {"bucket", "hub"}

    @pytest.mark.parametrize(("scope", "name"), [(Scope.BATCH, "three"), (Scope.BASE, "/models/none")])
    def test_what_is_not_there_is_not_paused(self, store, submit, scope, name):
        submit()
        with pytest.raises(NotFoundError, match=f"has no {scope} {name}"):
            store.pause(scope, name, "ann", "why")
        assert store.pauses() == ()

    @pytest.mark.parametrize(("scope", "name"), [(Scope.QUEUE, "x"), (Scope.PLACE, ""), (Scope.BATCH, "")])
    def test_a_pause_names_what_it_is_of(self, scope, name):
        with pytest.raises(BadInputError, match="expected"):
            check_scope(scope, name)

    def test_held_jobs_can_be_cancelled_and_retried(self, store, driver, submit):
        submit(["hub"])
        store.pause(Scope.BATCH, "one", "ann", "why")
        assert store.cancel(["hub"]) == ("hub",)
        assert driver.record("hub").held_by == ""
        assert store.retry(["hub"]) == ("hub",)
        assert claim(store) == set()
        assert driver.record("hub").held_by == "batch one"

    def test_a_pause_hides_no_other_job(self, store, make_request):
        """Many covered jobs come first, by priority and by age, and are met by the claim itself."""
        store.submit([make_request(f"h{index}", adapter="hf://org/a", priority=1) for index in range(150)])
        store.submit([make_request("free")])
        store.submit([make_request(f"i{index}", adapter="hf://org/a") for index in range(150)])
        store.pause(Scope.PLACE, "hf://", "ann", "why")
        assert store.num_held() == {}
        assert claim(store, 1) == {"free"}


class TestBothCauses:
    def test_an_operators_pause_outlives_that_of_a_fault(self, store, driver, submit):
        submit(["bucket"])
        driver.claim("bucket")
        store.pause_place("s3://releases", "bucket", by="driver", reason="gone", **FAULT)
        store.pause(Scope.PLACE, "s3://releases", "ann", "I look at it")
        assert {pause.cause for pause in store.pauses()} == {Cause.FAULT, Cause.OPERATOR}
        driver.probe_now()
        store.let_go("bucket", 1, "drain")
        assert claim(store) == set()  # what a person has paused is not tried
        store.send_probe("s3://releases", "bucket")
        (ended,) = store.passed("bucket", JobState.PUBLISHED)
        assert ended.cause is Cause.FAULT
        assert claim(store) == set()
        assert driver.record("bucket").held_by == "place s3://releases"
        store.resume(Scope.PLACE, "s3://releases")
        assert claim(store) == {"bucket"}

    def test_a_person_ends_both(self, store, driver, submit):
        submit(["bucket"])
        driver.claim("bucket")
        store.pause_place("s3://releases", "bucket", by="driver", reason="gone", **FAULT)
        store.pause(Scope.PLACE, "s3://releases", "ann", "why")
        store.let_go("bucket", 1, "drain")
        assert claim(store) == set()
        assert len(store.resume(Scope.PLACE, "s3://releases")) == 2
        assert claim(store) == {"bucket"}


class TestWhenSomethingIsDue:
    def test_what_people_have_paused_is_not(self, store, submit):
        submit(["bucket"])
        store.pause(Scope.PLACE, "s3://releases", "ann", "why")
        assert store.seconds_until_due() is None
        submit(["hub"])
        assert store.seconds_until_due() == 0

    def test_a_paused_queue_has_only_what_is_at_work(self, store, driver, submit):
        submit(["bucket", "hub"])
        driver.claim("bucket", seconds=100)
        store.pause(Scope.QUEUE, "", "ann", "why")
        assert 90 < store.seconds_until_due() <= 100
        store.cancel(["bucket"])
        store.let_go("bucket", 1, "stopped")
        assert store.seconds_until_due() is None

    def test_a_place_at_fault_is_when_it_is_tried(self, store, driver, submit):
        submit(["bucket"])
        driver.claim("bucket")
        store.pause_place("s3://releases", "bucket", by="driver", reason="gone", **FAULT)
        store.let_go("bucket", 1, "fault")
        assert claim(store) == set()
        assert 90 < store.seconds_until_due() <= 100
        driver.probe_now()
        assert store.seconds_until_due() == 0


class TestPassed:
    @pytest.mark.parametrize("name", sorted(JOBS))
    def test_a_place_is_known_to_work_by_what_was_published_through_it(self, store, driver, submit, make_release, name):
        submit([name])
        token = driver.begin(name)
        places = [(place, covered) for scope, place, covered in COVERED if scope is Scope.PLACE]
        assert not any(store.has_published(place) for place, _ in places)
        settle(store, name, token, make_release(name), None)
        assert {place for place, _ in places if store.has_published(place)} == {
            place for place, covered in places if name in covered
        }
