"""Faults of places: they pause, cost no job an attempt, and end when a job gets past them."""

import pytest

from cluster.driving.events import PlacePaused, PlaceResumed
from cluster.driving.places import MAX_EXCUSED_FAULTS
from jobs.errors import FailureClass
from jobs.request import MergeRequest
from jobs.states import JobState
from tests.unit.cluster.driving.scripted import failed, staged
from workers.merging.outcomes import Progress

AWAY = {"failure_class": FailureClass.TRANSIENT_IO, "place": "s3://bucket"}


def to_bucket(name, bucket="bucket", base="/bases/a", **fields):
    return MergeRequest(id=name, base=base, adapter=f"/adapters/{name}", destination=f"s3://{bucket}/{name}", **fields)


def told(it, kind):
    return [event for event in it.events if isinstance(event, kind)]


def publish(it, worker, *names):
    """Have jobs of the unit of a worker staged and published."""
    it.workers.finish(worker, *map(staged, names))
    it.step(2)
    for name in names:
        it.workers.finish_publish(worker, name)
    it.step(3)


def test_a_bucket_that_is_away_costs_no_attempt_and_stops_what_needs_it_alone(fleet):
    it = fleet(retry_delay_seconds=10.0, num_workers=2)
    it.submit(*map(to_bucket, ("one", "two", "three")), to_bucket("other", "elsewhere", base="/bases/b"))
    it.step()
    busy = it.workers.busy
    [worker] = [name for name, jobs in busy.items() if "one" in jobs]
    it.workers.finish(worker, *(failed(name, **AWAY) for name in busy[worker]))
    it.step(3)
    assert {it.job(name).attempts for name in busy[worker]} == {0}
    assert {it.job(name).state for name in busy[worker]} == {JobState.QUEUED}
    assert [(event.place, event.failure_class) for event in told(it, PlacePaused)] == [
        ("s3://bucket", FailureClass.TRANSIENT_IO)
    ]
    assert it.metrics.places == {"s3://bucket"}
    [pause] = it.store.pauses()
    assert (pause.name, pause.failure_class, pause.num_faults) == ("s3://bucket", FailureClass.TRANSIENT_IO, 1)
    [event] = [event for event in it.store.events("one") if "place" in event.detail]
    assert (event.detail["place"], event.state) == ("s3://bucket", JobState.QUEUED)
    assert it.job("other").state is JobState.PLANNING
    assert sum(len(jobs) for jobs in it.workers.busy.values()) == 1


def test_one_job_finds_out_whether_it_works_and_the_pauses_grow(fleet):
    it = fleet(retry_delay_seconds=10.0)
    it.submit(*map(to_bucket, ("one", "two", "three")))
    it.step()
    it.workers.finish("merge-worker-0", *(failed(name, **AWAY) for name in ("one", "two", "three")))
    it.step(2)
    for rest, num_faults in ((10, 1), (20, 2), (40, 3)):
        [pause] = it.store.pauses()
        assert (pause.num_faults, it.workers.busy) == (num_faults, {})
        it.wait(rest - 1)
        it.step(2)
        assert it.workers.busy == {}
        it.wait(1)
        it.step(2)
        [(job,)] = it.workers.busy.values()
        it.workers.finish("merge-worker-0", failed(job, **AWAY))
        it.step(2)
    it.wait(80)
    it.step(2)
    [(job,)] = it.workers.busy.values()
    it.workers.progress["merge-worker-0"] = Progress(unit="u", stages={job: "merge"}, bytes_done=1, bytes_total=2)
    it.clock.now += 1
    it.step(2)
    assert it.store.pauses() == ()
    assert [event.place for event in told(it, PlaceResumed)] == ["s3://bucket"]
    assert len(told(it, PlacePaused)) == 1
    publish(it, "merge-worker-0", job)
    it.step()
    [rest] = it.workers.busy.values()
    publish(it, "merge-worker-0", *rest)
    assert set(it.states().values()) == {JobState.PUBLISHED}
    assert {it.job(name).attempts for name in ("one", "two", "three")} == {1}


def test_a_fault_while_shards_are_sent_is_not_over_before_they_are(fleet):
    it = fleet(retry_delay_seconds=1.0)
    it.submit(to_bucket("one"))
    it.step()
    merging = Progress(unit="u", stages={"one": "merge"}, bytes_done=1, bytes_total=2)
    it.workers.progress["merge-worker-0"] = merging
    it.clock.now += 1
    it.step(2)
    it.workers.finish("merge-worker-0", failed("one", **AWAY))
    it.step(2)
    it.wait(2)
    it.step(2)
    it.workers.progress["merge-worker-0"] = merging
    it.clock.now += 1
    it.step(2)
    assert it.job("one").state is JobState.MERGING
    assert len(it.store.pauses()) == 1
    it.workers.finish("merge-worker-0", staged("one"))
    it.step(2)
    assert it.store.pauses() == ()


def test_credentials_that_never_worked_fail_their_job_and_those_that_did_pause_the_bucket(fleet):
    it = fleet(retry_delay_seconds=5.0)
    denied = {"failure_class": FailureClass.AUTH, "place": "s3://bucket"}
    it.submit(to_bucket("one"))
    it.step()
    it.workers.finish("merge-worker-0", failed("one", **denied))
    it.step()
    assert (it.job("one").state, it.store.pauses()) == (JobState.FAILED, ())
    it.submit(to_bucket("two"))
    it.step(2)
    publish(it, "merge-worker-0", "two")
    it.submit(to_bucket("three"), to_bucket("four", base="/bases/b"))
    it.step(2)
    [(first,)] = it.workers.busy.values()
    it.workers.finish("merge-worker-0", failed(first, **denied))
    it.step(2)
    assert (it.job(first).state, len(it.store.pauses())) == (JobState.QUEUED, 1)
    # The other one goes ahead, as it has not failed yet, and gets past: so it was the job's own fault.
    it.wait(5)
    it.step(2)
    [(second,)] = it.workers.busy.values()
    assert second != first
    publish(it, "merge-worker-0", second)
    it.step()
    it.workers.finish("merge-worker-0", failed(first, **denied))
    it.step()
    assert (it.job(first).state, it.job(first).failure_class) == (JobState.FAILED, FailureClass.AUTH)


def test_a_job_that_always_meets_a_fault_that_others_get_past_is_charged_in_the_end(fleet):
    it = fleet(num_workers=2, retry_delay_seconds=0.0)
    it.submit(to_bucket("bad"))
    it.step()
    number = 0
    while it.job("bad").state is not JobState.FAILED:
        number += 1
        assert number < 100
        [worker] = [name for name, jobs in it.workers.busy.items() if "bad" in jobs]
        it.submit(to_bucket(f"good-{number}", base="/bases/b"))
        it.step(2)
        [beside] = [name for name, jobs in it.workers.busy.items() if f"good-{number}" in jobs]
        publish(it, beside, f"good-{number}")
        it.workers.finish(worker, failed("bad", **AWAY))
        it.step(3)
    assert number == MAX_EXCUSED_FAULTS + 5  # max_attempts
    assert it.job("bad").attempts == 5
    assert it.store.pauses() == ()


def test_a_disk_that_no_request_names_rests_its_machine_and_not_the_others(fleet):
    hosts = {"merge-worker-0": "north", "merge-worker-1": "south"}
    it = fleet(num_workers=2, hosts=hosts, retry_delay_seconds=10.0)
    it.submit(to_bucket("one"), to_bucket("two", base="/bases/b"))
    it.step()
    full = {"failure_class": FailureClass.NO_CAPACITY, "place": "file:///scratch"}
    [job] = it.workers.busy["merge-worker-0"]
    it.workers.finish("merge-worker-0", failed(job, **full))
    it.step(3)
    assert [event.place for event in told(it, PlacePaused)] == ["node:north"]
    assert (it.job(job).state, it.job(job).attempts) == (JobState.LEASED, 0)  # it waits for the other machine
    [other] = it.workers.busy["merge-worker-1"]
    publish(it, "merge-worker-1", other)
    assert it.workers.busy == {"merge-worker-1": (job,)}
    publish(it, "merge-worker-1", job)
    it.wait(20)
    it.submit(to_bucket("three"), to_bucket("four", base="/bases/b"))
    it.step(2)
    [tried] = it.workers.busy["merge-worker-0"]
    publish(it, "merge-worker-0", tried)
    assert it.store.pauses() == ()


def test_what_people_have_paused_is_not_waited_for(fleet):
    from jobs.ledger.pauses import Scope

    it = fleet()
    it.submit(to_bucket("one"), to_bucket("two", "other"))
    it.store.pause(Scope.PLACE, "s3://bucket", "me", "")
    it.workers.on_poll = lambda: (
        it.workers.busy
        and it.workers.finish(
            "merge-worker-0", *(failed(name, FailureClass.BAD_INPUT) for name in it.workers.busy["merge-worker-0"])
        )
    )
    assert it.driver.run(drain=True).left == 1
    assert it.states() == {"one": JobState.QUEUED, "two": JobState.FAILED}


@pytest.mark.parametrize("failure_class", [FailureClass.BAD_INPUT, FailureClass.PARITY_FAILED, FailureClass.INTERNAL])
def test_a_probe_that_fails_by_itself_says_nothing_of_the_place(fleet, failure_class):
    it = fleet(retry_delay_seconds=1.0)
    it.submit(to_bucket("one"), to_bucket("two", base="/bases/b"))
    it.step()
    [(first,)] = it.workers.busy.values()
    it.workers.finish("merge-worker-0", failed(first, **AWAY))
    it.step(2)
    it.wait(2)
    it.step(2)
    [(second,)] = it.workers.busy.values()
    it.workers.finish("merge-worker-0", failed(second, failure_class))
    it.step(3)
    assert len(it.store.pauses()) == 1
    assert list(it.workers.busy.values()) == [(first,)]


def test_what_only_has_to_wait_for_room_is_not_charged(fleet):
    it = fleet(retry_delay_seconds=4.0)
    it.submit(to_bucket("one"))
    it.step()
    it.workers.finish("merge-worker-0", failed("one", FailureClass.NO_CAPACITY, waits=True))
    it.step()
    job = it.job("one")
    assert (job.state, job.attempts, it.store.pauses()) == (JobState.RETRY_WAIT, 0, ())
    assert 2.0 <= job.not_before - it.ledger_time + 0.02 <= 4.02


def test_a_worker_that_memory_ended_with_several_jobs_has_each_run_alone(fleet):
    it = fleet()
    it.submit(to_bucket("one"), to_bucket("two"))
    it.step()
    it.workers.lose("merge-worker-0", out_of_memory=True)
    it.step(3)
    assert {it.job(name).failure_class for name in ("one", "two")} == {FailureClass.OUT_OF_MEMORY}
    assert {it.job(name).attempts for name in ("one", "two")} == {0, 1}  # one of them is at it again
    assert [len(jobs) for jobs in it.workers.busy.values()] == [1]
    it.workers.lose("merge-worker-0", out_of_memory=True)
    it.step()
    assert sorted(it.job(name).worker_losses for name in ("one", "two")) == [0, 0]


def test_an_attempt_that_takes_too_long_is_ended(fleet):
    it = fleet(lease_seconds=600.0)
    it.submit(to_bucket("slow", timeout_seconds=60), to_bucket("quick"))
    it.step()
    it.wait(59)
    it.step(2)
    assert it.job("slow").state is JobState.PLANNING
    it.wait(2)
    it.step()
    assert (it.job("slow").state, it.job("slow").failure_class) == (JobState.FAILED, FailureClass.TIMED_OUT)
    assert it.workers.cancelled[-1] == ("merge-worker-0", ("slow",))
    it.workers.finish("merge-worker-0", failed("slow", FailureClass.CANCELLED), staged("quick"))
    it.step()
    assert it.job("quick").state is JobState.PUBLISHING


def test_a_driver_that_is_stopped_waits_only_so_long_for_what_is_being_published(fleet):
    it = fleet(stop_seconds=30.0)
    it.submit(to_bucket("one"))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"))
    it.step(2)
    it.driver.stop()
    it.workers.on_poll = lambda: it.wait(10)
    summary = it.driver.run(drain=False)
    assert summary.left == 1
    assert it.job("one").state is JobState.PUBLISHING


def test_credentials_that_worked_for_an_earlier_driver_pause_the_bucket(fleet):
    before = fleet()
    before.submit(to_bucket("one"))
    before.step()
    publish(before, "merge-worker-0", "one")
    it = fleet()  # a new driver on the same ledger
    denied = {"failure_class": FailureClass.AUTH, "place": "s3://bucket"}
    it.submit(to_bucket("two"))
    it.step(2)
    it.workers.finish("merge-worker-0", failed("two", **denied))
    it.step()
    assert (it.job("two").state, it.job("two").attempts) == (JobState.QUEUED, 0)
    [pause] = it.store.pauses()
    assert (pause.name, pause.failure_class) == ("s3://bucket", FailureClass.AUTH)


def test_a_job_that_began_before_its_credentials_expired_is_not_at_fault(fleet):
    it = fleet(retry_delay_seconds=5.0, num_workers=2)
    denied = {"failure_class": FailureClass.AUTH, "place": "s3://bucket"}
    it.submit(to_bucket("long"), to_bucket("short", base="/bases/b"))
    it.step()
    at = {name: worker for worker, names in it.workers.busy.items() for name in names}
    publish(it, at["short"], "short")  # while the other is at work
    it.workers.finish(at["long"], failed("long", **denied))
    it.step(2)
    assert (it.job("long").state, it.job("long").attempts) == (JobState.QUEUED, 0)
    it.wait(6)
    it.step(2)
    [(worker, _)] = it.workers.busy.items()  # it goes ahead, and is denied still
    it.workers.finish(worker, failed("long", **denied))
    it.step(2)
    assert (it.job("long").state, it.store.pauses()[0].num_faults) == (JobState.QUEUED, 2)
