"""The driver against a real store and a real pool, in memory, of workers that answer what the test says.

What Ray does is in tests/integration/test_driver.py.
"""

import dataclasses

import pytest

from cluster.console.display import event_line
from cluster.driving.driver import Driver
from cluster.driving.events import JobSettled, WorkerBenched, WorkerReplaced
from cluster.settings import Settings
from jobs.errors import FailureClass, LeaseLostError, TransientIOError
from jobs.states import JobState
from tests.releases import begin, settle
from tests.unit.cluster.driving.scripted import CountedMetrics, Fleet, failed, release, request, staged
from workers.merging.outcomes import Failure, JobOutcome, Progress, Usage


def test_a_batch_goes_from_queue_to_release(fleet):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    assert it.workers.units == [("merge-worker-0", "merge:a:2 adapters", ("one", "two"))]
    it.workers.finish("merge-worker-0", staged("one"), staged("two"))
    it.step()
    assert it.workers.published == [("merge-worker-0", "one"), ("merge-worker-0", "two")]
    assert it.states() == {"one": JobState.PUBLISHING, "two": JobState.PUBLISHING}
    it.workers.finish_publish("merge-worker-0", "one")
    it.workers.finish_publish("merge-worker-0", "two")
    it.step()
    assert it.states() == {"one": JobState.PUBLISHED, "two": JobState.PUBLISHED}
    assert it.history("one") == [
        JobState.QUEUED,
        JobState.LEASED,
        JobState.PLANNING,
        JobState.MERGING,
        JobState.VERIFYING,
        JobState.PUBLISHING,
        JobState.PUBLISHED,
    ]
    assert it.workers.discarded == []  # a worker lets go of what it has published
    assert (it.driver.summary().published, it.driver.summary().left) == (2, 0)
    assert it.metrics.settlements == {"published": 2}
    assert it.metrics.counts == {"units": 1, "calls with usage": 1, "publications": 2}
    it.clock.now += 60
    it.step()
    assert {state: num for state, num in it.metrics.gauges["jobs"].items() if num} == {JobState.PUBLISHED: 2}


def test_events_name_worker_machine_and_log_and_what_the_pass_took(fleet):
    it = fleet(hosts={"merge-worker-0": "node-7"})
    it.submit(request("one"), request("two"))
    it.step()
    begun = it.store.events("one")[-1].detail
    assert (begun["worker"], begun["node"], begun["log"]) == (
        "merge-worker-0",
        "node-7",
        "merge-worker-0@node-7.jsonl",
    )
    usage = Usage(bytes_read=10, bytes_written=20, bytes_uploaded=5, seconds={"fetch": 0.25, "merge": 1.23456})
    it.workers.finish("merge-worker-0", staged("one"), failed("two", FailureClass.BAD_INPUT), usage=usage)
    it.step()
    assert it.store.events("one")[-1].detail == {
        "unit": {
            "jobs": 2,
            "bytes_read": 10,
            "bytes_written": 20,
            "bytes_uploaded": 5,
            "seconds": {"fetch": 0.25, "merge": 1.235},
        }
    }


def test_a_pass_that_several_share_took_what_all_of_them_took(fleet):
    it = fleet(num_workers=2)
    it.step()
    it.submit(request("one"))
    it.step()
    ((leader, _, _),) = it.workers.opened
    it.workers.begin(leader, "one", num_pieces=2, usage=Usage(bytes_read=1, seconds={"plan": 1.0}))
    it.step(2)
    for worker, _ in list(it.workers.given):
        it.workers.merge(worker, "one", usage=Usage(bytes_read=10, seconds={"merge": 2.0}))
    it.step(2)
    it.workers.finish(leader, staged("one"), usage=Usage(bytes_written=7, seconds={"merge": 0.5, "behaviour": 3.0}))
    it.step()
    unit = it.store.events("one")[-1].detail["unit"]
    assert len(it.workers.given) == 2
    assert (unit["bytes_read"], unit["bytes_written"]) == (21, 7)
    assert unit["seconds"] == {"plan": 1.0, "merge": 4.5, "behaviour": 3.0}


def test_an_idle_driver_is_seen(fleet):
    it = fleet()
    it.store.register_driver("driver-a", "here", 1, "")
    it.wait(11.0)
    it.step()
    (driver,) = it.store.drivers()
    assert driver.seen_at == it.ledger_time


def test_a_job_that_fails_fails_alone(fleet):
    it = fleet()
    it.submit(request("good"), request("bad"), request("slow"))
    it.step()
    it.workers.finish(
        "merge-worker-0",
        staged("good"),
        failed("bad", FailureClass.PARITY_FAILED),
        failed("slow", FailureClass.TRANSIENT_IO),
    )
    it.step()
    assert it.states() == {"good": JobState.PUBLISHING, "bad": JobState.FAILED, "slow": JobState.RETRY_WAIT}
    assert it.job("bad").failure_class is FailureClass.PARITY_FAILED
    assert it.job("bad").failure_message == "parity_failed it is"
    assert it.driver.summary().failures == {FailureClass.PARITY_FAILED: 1}
    assert it.metrics.settlements == {"parity_failed": 1, "transient_io": 1}


def test_a_release_that_is_there_already_is_settled_and_nothing_published(fleet):
    it = fleet()
    it.submit(request("one"))
    it.step()
    there = JobOutcome(
        job_id="one",
        merge_key="a" * 64,
        failure=None,
        release=release("one", created=False),
        parity=None,
        report_path=None,
    )
    it.workers.finish("merge-worker-0", there)
    it.step()
    assert it.states() == {"one": JobState.PUBLISHED}
    assert it.workers.published == []
    assert (it.driver.summary().published, it.driver.summary().unchanged) == (0, 1)


def test_what_should_be_known_of_a_release_is_told_with_it(fleet):
    it = fleet()
    it.submit(request("one"))
    it.step()
    found = release("one")
    manifest = found.manifest.model_copy(update={"notes": ("the tokenizer ends elsewhere",)})
    told = JobOutcome(job_id="one", merge_key="a" * 64, release=found.model_copy(update={"manifest": manifest}))
    it.workers.finish("merge-worker-0", told)
    it.step()
    [event] = [event for event in it.events if isinstance(event, JobSettled)]
    assert event_line(event).plain == "one  published: /releases/one\none  note: the tokenizer ends elsewhere"


def test_publishing_that_fails_is_decided_like_any_failure(fleet):
    it = fleet()
    it.submit(request("one"))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    failure = Failure(failure_class=FailureClass.AUTH, message="no credentials")
    it.workers.finish_publish("merge-worker-0", "one", failure)
    it.step()
    assert it.job("one").state is JobState.FAILED


def test_progress_is_shared_out_and_moves_jobs_through_every_state_between(fleet):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    stages = {"one": "merge", "two": "failed"}
    seen = Progress(unit="u", stages=stages, bytes_done=100, bytes_total=1000)
    it.workers.progress["merge-worker-0"] = seen
    it.clock.now += 1  # they are asked again
    it.step()
    assert it.history("one")[1:] == [JobState.LEASED, JobState.PLANNING, JobState.MERGING]
    assert (it.job("one").stage, it.job("one").bytes_done, it.job("one").bytes_total) == ("merge", 50, 500)
    assert it.job("two").state is JobState.PLANNING


def test_a_worker_that_is_lost_with_several_jobs_is_charged_to_none_of_them(fleet):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    it.workers.lose("merge-worker-0")
    it.step()
    assert it.states() == {"one": JobState.QUEUED, "two": JobState.QUEUED}
    assert [(it.job(name).attempts, it.job(name).worker_losses) for name in ("one", "two")] == [(0, 0)] * 2
    assert [event.reason for event in it.events if isinstance(event, WorkerReplaced)] == ["killed by signal 9"]
    last = it.store.events("one")[-1]
    assert last.detail["reason"] == "its unit failed as a whole: not charged, runs alone next"
    assert last.detail["message"] == "merge-worker-0 was lost with 2 jobs: killed by signal 9"
    assert it.metrics.counts["deaths"] == 1


def test_suspects_run_alone_beside_the_rest_and_the_one_that_kills_again_is_quarantined(fleet):
    it = fleet(num_workers=2, max_jobs_per_pass=3)
    names = ("one", "killer", "two", "three", "four", "five")
    it.submit(*(request(name) for name in names))
    it.step()
    assert [jobs for _, _, jobs in it.workers.units] == [("one", "killer", "two"), ("three", "four", "five")]
    it.workers.units.clear()
    late = ("six", "seven", "eight", "nine")
    it.submit(*(request(name) for name in late))
    it.workers.lose("merge-worker-0")

    def answer():
        """End every unit in a round: with the loss of its worker where the killer is in it."""
        for worker, jobs in list(it.workers.busy.items()):
            if "killer" in jobs:
                it.workers.lose(worker)
            else:
                it.workers.finish(worker, *(staged(job) for job in jobs))
        for worker, job in it.workers.published[answer.num_published :]:
            it.workers.finish_publish(worker, job)
        answer.num_published = len(it.workers.published)

    answer.num_published = 0
    it.workers.on_poll = answer
    it.driver.run(drain=True)
    assert it.states() == {
        name: JobState.QUARANTINED if name == "killer" else JobState.PUBLISHED for name in (*names, *late)
    }
    good = [it.job(name) for name in it.states() if name != "killer"]
    assert {(record.attempts, record.worker_losses) for record in good} == {(1, 0)}
    units = [jobs for _, _, jobs in it.workers.units]
    # The suspects alone and first, the others together; the killer twice.
    suspects = [unit for unit in units if not {"one", "killer", "two"}.isdisjoint(unit)]
    assert sorted(suspects) == [("killer",), ("killer",), ("one",), ("two",)]
    assert units[: len(suspects)] == suspects
    assert next(unit for unit in units if unit not in suspects) == ("six", "seven", "eight")
    killer = it.job("killer")
    assert (killer.attempts, killer.worker_losses) == (2, 2)
    assert killer.failure_message.endswith(
        "was lost with 1 job: killed by signal 9; 2 workers were lost while it ran alone, so it is not tried again; "
        "its events have the reason of each"
    )


def test_a_gpu_that_fails_is_not_charged_to_its_job_which_goes_to_another_worker(fleet):
    it = fleet(num_workers=2)
    it.submit(request("one"), request("two", base="/bases/b"))
    it.step()
    [(worker, _, _), (other, _, jobs)] = it.workers.units
    it.workers.lose_gpu(worker)
    it.step()
    it.clock.now += 2  # its place has rested
    it.step(3)
    assert it.states()["one"] is JobState.LEASED  # it waits: the worker that is idle is the one whose GPU failed
    assert (it.job("one").attempts, it.job("one").worker_losses, len(it.workers.units)) == (0, 0, 2)
    assert it.store.events("one")[-2].detail["reason"] == "the GPU failed: not charged, runs alone next"
    it.workers.finish(other, *(staged(job) for job in jobs))
    it.step(2)
    it.workers.finish_publish(other, jobs[0])
    it.step(3)
    assert it.workers.units[-1][::2] == (other, ("one",))


def test_a_job_under_which_gpus_fail_again_and_again_is_charged_in_the_end(fleet):
    it = fleet()
    it.submit(request("one"))
    num_faults = 0
    while it.states()["one"] is not JobState.QUARANTINED and num_faults < 20:
        it.clock.now += 400  # its place has rested
        it.step(3)
        it.workers.lose_gpu("merge-worker-0")
        it.step()
        num_faults += 1
    assert num_faults == 3 + 2  # those it is excused from, and max_worker_losses


def test_a_job_that_was_at_work_when_six_drivers_were_lost_in_a_row_is_not_tried_again(fleet):
    it = fleet()
    it.submit(request("one"))
    for number in range(6):
        [lease] = it.store.claim(f"driver-{number}", 1, 0.05)
        begin(it.store, "one", lease.token)
        it.ledger_time += 0.06
        it.store.claim("another", 1, 0.05) if number else None  # finds it lost
        it.ledger_time += 400
    it.step()
    assert (it.states(), it.workers.units) == ({"one": JobState.QUARANTINED}, [])
    assert "6 drivers in a row were lost" in it.job("one").failure_message
    assert it.driver.summary().failures == {FailureClass.WORKER_LOST: 1}


def test_a_suspect_stays_one_for_the_next_driver(fleet):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    it.workers.lose("merge-worker-0")
    it.step()
    leases = it.store.claim("driver-b", 8, 60)
    assert [(lease.job_id, lease.suspect) for lease in leases] == [("one", True), ("two", True)]
    it.store.let_go("one", leases[0].token, "stopped")
    assert it.store.claim("driver-b", 1, 60)[0].suspect


def test_a_job_cancelled_before_its_worker_was_lost_ends_cancelled(fleet):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    it.store.cancel(["two"])
    it.workers.lose("merge-worker-0")
    it.step()
    assert it.states() == {"one": JobState.QUEUED, "two": JobState.CANCELLED}


def test_a_fault_that_ends_a_whole_unit_is_held_against_a_job_that_has_it_alone(fleet):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    it.workers.fail("merge-worker-0", ValueError("boom"))
    it.step()
    assert it.job("two").attempts == 0
    it.step(2)
    assert it.workers.units[-1][2] == ("one",)
    it.workers.finish("merge-worker-0", failed("one", FailureClass.INTERNAL))
    it.step(3)
    assert it.workers.units[-1][2] == ("two",)
    it.workers.finish("merge-worker-0", staged("two"))
    it.step()
    assert it.states() == {"one": JobState.FAILED, "two": JobState.PUBLISHING}


def test_a_listener_that_raises_changes_nothing(tmp_path):
    it = Fleet(tmp_path)
    said = []

    def listener(event):
        said.append(event)
        "\udcff".encode()

    driver = Driver(
        it.store, it.pool, Settings(poll_seconds=0.01), CountedMetrics(), owner="driver-b", listener=listener
    )
    it.submit(request("one"), request("two", base="/bases/b"))
    it.workers.on_poll = lambda: [
        it.workers.finish(worker, *(failed(job, FailureClass.BAD_INPUT) for job in jobs))
        for worker, jobs in it.workers.busy.items()
    ]
    assert driver.run(drain=True).failures == {FailureClass.BAD_INPUT: 2}
    assert len(said) == 4
    it.store.close()


def test_an_exception_out_of_a_worker_fails_the_unit_as_a_fault(fleet):
    it = fleet()
    it.submit(request("one"))
    it.step()
    it.workers.fail("merge-worker-0", ValueError("boom"))
    it.step()
    assert it.job("one").failure_class is FailureClass.INTERNAL
    assert "boom" in it.job("one").failure_message


def test_a_job_without_an_outcome_fails_as_a_fault(fleet):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    assert it.states() == {"one": JobState.PUBLISHING, "two": JobState.FAILED}


def test_a_job_cancelled_while_it_waits_for_a_worker_never_runs(fleet):
    it = fleet()
    it.submit(request("one"), request("two", base="/bases/b"))
    it.step()
    it.store.cancel(["two"])
    it.step()
    assert it.states() == {"one": JobState.PLANNING, "two": JobState.CANCELLED}


def test_a_job_cancelled_while_it_runs_is_told_to_stop_and_ends_cancelled(fleet):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    it.store.cancel(["two"])
    it.step()
    assert it.states() == {"one": JobState.PLANNING, "two": JobState.CANCELLED}  # it waits for no other
    it.step()
    assert it.workers.cancelled == 2 * [("merge-worker-0", ("two",))]  # until it has heard
    it.workers.finish("merge-worker-0", staged("one"), failed("two", FailureClass.CANCELLED))
    it.step(2)
    assert it.states() == {"one": JobState.PUBLISHING, "two": JobState.CANCELLED}
    assert len(it.workers.cancelled) == 3


def test_a_job_cancelled_after_its_last_tensor_is_not_published(fleet):
    it = fleet()
    it.submit(request("one"))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"))
    it.workers.on_poll = lambda: it.store.cancel(["one"])
    it.step()
    assert it.job("one").state is JobState.CANCELLED
    assert it.workers.published == []
    assert it.workers.discarded == [("merge-worker-0", "one")]


def test_a_release_that_needs_approval_waits_for_it_and_is_then_published_under_that_name(fleet):
    it = fleet()
    it.submit(request("one", requires_approval=True), request("two"))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"), staged("two"))
    it.step()
    assert it.states() == {"one": JobState.AWAITING_APPROVAL, "two": JobState.PUBLISHING}
    assert it.workers.left == [("merge-worker-0", "one")]
    it.workers.finish_publish("merge-worker-0", "two")
    assert it.driver.run(drain=True).left == 1  # which it does not wait for
    it.store.approve(["one"], "ann")
    it.step()
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    assert it.workers.published[-1] == ("merge-worker-0", "one")
    assert it.workers.approved == {"two": None, "one": "ann"}
    it.workers.finish_publish("merge-worker-0", "one")
    it.step()
    assert it.job("one").state is JobState.PUBLISHED


def test_a_release_that_needs_approval_and_was_cancelled_is_dropped(fleet):
    it = fleet()
    it.submit(request("one", requires_approval=True))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"))
    it.workers.on_poll = lambda: it.store.cancel(["one"])
    it.step()
    assert it.job("one").state is JobState.CANCELLED
    assert (it.workers.left, it.workers.discarded) == ([], [("merge-worker-0", "one")])


def test_a_release_other_than_the_one_that_was_approved_is_asked_for_again(fleet):
    it = fleet()
    it.submit(request("one", requires_approval=True))
    it.step()
    it.workers.finish("merge-worker-0", dataclasses.replace(staged("one"), merge_key="f" * 64))
    it.step()
    it.store.approve(["one"], "ann")
    it.step(2)
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    assert it.job("one").state is JobState.AWAITING_APPROVAL
    assert it.workers.published == []


def test_a_lease_that_runs_out_while_a_cancellation_is_written_ends_no_driver(fleet, monkeypatch):
    it = fleet()
    it.submit(request("one"), request("two", base="/bases/b"))
    it.step()
    it.store.cancel(["one"])

    def fail(*_args, **_kwargs):
        raise LeaseLostError("job 'one': lease lost")

    monkeypatch.setattr(it.store, "fail", fail)
    it.workers.finish("merge-worker-0", staged("one"))
    it.step(3)
    assert it.workers.discarded == [("merge-worker-0", "one")]
    assert it.workers.units[-1][2] == ("two",)


def test_leases_are_extended_every_third_of_their_length(fleet):
    it = fleet(lease_seconds=30.0)
    it.submit(request("one"))
    it.step()
    first = it.job("one").lease_expires_at
    it.clock.now = 9.0
    it.step()
    assert it.job("one").lease_expires_at == first
    it.clock.now = 11.0
    it.step()
    assert it.job("one").lease_expires_at > first


def test_a_job_whose_lease_was_lost_is_stopped_and_nothing_is_written_for_it(fleet):
    it = fleet(lease_seconds=1.0)
    it.submit(request("one"))
    it.step()
    it.ledger_time += 1.1
    assert [lease.job_id for lease in it.store.claim("driver-b", 8, 60)] == ["one"]
    it.clock.now = 5.0
    it.step()
    assert it.workers.cancelled == [("merge-worker-0", ("one",))]
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    assert it.workers.published == []
    assert it.workers.discarded == [("merge-worker-0", "one")]
    assert (it.job("one").owner, it.job("one").state) == ("driver-b", JobState.LEASED)


def test_the_fence_keeps_a_driver_without_a_lease_from_publishing(fleet):
    """The lease runs out between two extensions, and the unit ends before the driver knows."""
    it = fleet(lease_seconds=1.0)
    it.submit(request("one"))
    it.step()
    it.ledger_time += 1.1
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    assert it.workers.published == []
    assert it.workers.discarded == [("merge-worker-0", "one")]


def test_a_driver_that_claims_its_own_lost_job_stops_the_run_that_lost_it(fleet):
    it = fleet(num_workers=2, lease_seconds=1.0)
    it.submit(request("one"), request("two", base="/bases/b"))
    it.step()
    it.workers.finish("merge-worker-1", failed("two", FailureClass.BAD_INPUT))
    it.step()
    it.ledger_time += 1.1
    it.step(3)
    assert it.workers.cancelled[0] == ("merge-worker-0", ("one",))
    assert [unit[2] for unit in it.workers.units if unit[0] == "merge-worker-1"] == [("two",), ("one",)]
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    assert it.workers.published == []
    it.workers.finish("merge-worker-1", staged("one"))
    it.step()
    assert it.workers.published == [("merge-worker-1", "one")]


def test_stopping_gives_everything_back_and_counts_no_attempt(fleet):
    it = fleet()
    it.submit(request("one"), request("two", base="/bases/b"))
    it.step()
    it.driver.stop()
    assert it.driver.run(drain=False).left == 2
    assert it.workers.cancelled == [("merge-worker-0", ("one",))]
    assert it.states() == {"one": JobState.QUEUED, "two": JobState.QUEUED}
    assert [it.job(name).attempts for name in ("one", "two")] == [0, 0]


def test_what_is_staged_when_the_driver_stops_is_still_published(fleet):
    it = fleet()
    it.submit(request("one"))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    it.driver.stop()
    it.workers.finish_publish("merge-worker-0", "one")
    it.driver.run(drain=False)
    assert it.job("one").state is JobState.PUBLISHED


def test_a_driver_claims_what_its_workers_can_soon_take_and_leaves_the_rest(fleet):
    it = fleet(num_workers=2, max_jobs_per_pass=2)
    it.submit(*(request(f"job-{n}") for n in range(9)))
    it.step(3)
    assert [len(ids) for _, _, ids in it.workers.units] == [2, 2]
    assert it.store.counts()[JobState.QUEUED] == 5


def test_draining_ends_when_nothing_is_left(fleet):
    it = fleet()
    assert it.driver.run(drain=True).published == 0


def test_draining_waits_for_jobs_of_other_drivers(fleet):
    it = fleet()
    it.submit(request("one"))
    [lease] = it.store.claim("driver-b", 1, 60)
    rounds = []

    def end_after_three():
        rounds.append(1)
        if len(rounds) == 3:
            settle(it.store, "one", lease.token, release("one"), None)

    it.workers.on_poll = end_after_three
    it.driver.run(drain=True)
    assert len(rounds) == 3


def test_an_answer_is_not_lost_while_the_store_does_not_answer(fleet, monkeypatch):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"), failed("two", FailureClass.BAD_INPUT))
    advance = it.store.advance
    faults = iter([TransientIOError("store: locked")])

    def advance_or_fail(*args, **kwargs):
        for fault in faults:
            raise fault
        return advance(*args, **kwargs)

    monkeypatch.setattr(it.store, "advance", advance_or_fail)
    answers = iter(["one"])

    def publish_once():
        for name in answers if it.workers.published else ():
            it.workers.finish_publish("merge-worker-0", name)

    it.workers.on_poll = publish_once
    it.driver.run(drain=True)
    assert it.sleeps == [0.01]
    assert it.states() == {"one": JobState.PUBLISHED, "two": JobState.FAILED}
    assert it.workers.published == [("merge-worker-0", "one")]


def test_events_tell_what_became_of_each_job(fleet):
    it = fleet()
    it.submit(request("one"))
    it.step()
    it.workers.finish("merge-worker-0", failed("one", FailureClass.NOT_FOUND))
    it.step()
    [event] = [event for event in it.events if isinstance(event, JobSettled)]
    assert (event.job_id, event.state, event.failure_class) == ("one", JobState.FAILED, FailureClass.NOT_FOUND)


def shared(fleet, *names, num_workers=3, num_pieces=4, requests=None, **settings):
    """A fleet with one pass that is open, and its pieces given out."""
    it = fleet(num_workers=num_workers, max_jobs_per_pass=4, **settings)
    it.submit(*(request(name, **(requests or {})) for name in names))
    it.step()
    assert [(worker, jobs) for worker, _, jobs in it.workers.opened] == [("merge-worker-0", names)]
    it.workers.begin("merge-worker-0", *names, num_pieces=num_pieces)
    it.step(2)
    return it


def test_one_pass_is_shared_by_all_who_would_be_idle(fleet):
    it = shared(fleet, "one")
    assert it.workers.units == []
    assert sorted(it.workers.given) == [
        ("merge-worker-0", ("shard-0",)),
        ("merge-worker-1", ("shard-1",)),
        ("merge-worker-2", ("shard-2",)),
    ]
    it.workers.merge("merge-worker-1", "one")
    it.step(2)
    assert it.workers.given[-1] == ("merge-worker-1", ("shard-3",))
    assert it.workers.finishing == []
    for worker in ("merge-worker-0", "merge-worker-1", "merge-worker-2"):
        it.workers.merge(worker, "one")
    it.step(2)
    # shards in the order in which they were answered
    assert it.workers.finishing == [
        ("merge-worker-0", {"one": [("shard-1",), ("shard-0",), ("shard-3",), ("shard-2",)]})
    ]
    it.workers.finish("merge-worker-0", staged("one"))
    it.step()
    assert it.workers.published == [("merge-worker-0", "one")]
    it.workers.finish_publish("merge-worker-0", "one")
    it.step(2)
    assert it.states() == {"one": JobState.PUBLISHED}
    # Those who helped let go of it.
    assert {("merge-worker-1", "one"), ("merge-worker-2", "one")} <= set(it.workers.discarded)


def test_all_who_merged_leave_their_shards_to_the_attempt_that_is_approved(fleet):
    it = shared(fleet, "one", num_pieces=3, requests={"requires_approval": True})
    for worker in ("merge-worker-0", "merge-worker-1", "merge-worker-2"):
        it.workers.merge(worker, "one")
    it.step(2)
    it.workers.finish("merge-worker-0", staged("one"))
    it.step(2)
    assert it.states() == {"one": JobState.AWAITING_APPROVAL}
    assert sorted(it.workers.left) == [(f"merge-worker-{n}", "one") for n in range(3)]


def test_what_a_dead_worker_was_at_is_done_by_others(fleet):
    it = shared(fleet, "one")
    it.workers.lose("merge-worker-1")
    it.step(2)
    assert len(it.workers.given) == 3  # from now on one worker at a time
    for worker in ("merge-worker-0", "merge-worker-2"):
        it.workers.merge(worker, "one")
    it.step(2)
    for left in ("shard-1", "shard-3"):
        assert it.workers.given[-1] == ("merge-worker-0", (left,))
        it.workers.merge("merge-worker-0", "one")
        it.step(2)
    ((_, merged),) = it.workers.finishing
    assert sorted(merged["one"]) == [("shard-0",), ("shard-1",), ("shard-2",), ("shard-3",)]
    assert it.job("one").worker_losses == 0


def test_a_pass_outlives_the_worker_that_opened_it(fleet):
    it = shared(fleet, "one", num_pieces=3)
    it.workers.lose("merge-worker-0")
    it.workers.merge("merge-worker-1", "one")
    it.workers.merge("merge-worker-2", "one")
    it.step(2)
    assert it.workers.given[-1][1] == ("shard-0",)
    it.workers.merge(it.workers.given[-1][0], "one")
    it.step(2)
    assert [worker for worker, _ in it.workers.finishing] == ["merge-worker-0"]
    it.workers.lose("merge-worker-0")
    it.step()
    assert it.job("one").worker_losses == 1  # the second loss is the end of it
    assert it.states() == {"one": JobState.RETRY_WAIT}


def test_finishing_a_pass_is_asked_for_again_once(fleet):
    it = shared(fleet, "one")
    for _ in range(2):
        for worker in sorted(it.workers.busy):
            it.workers.merge(worker, "one")
        it.step(2)
    assert len(it.workers.finishing) == 1
    it.workers.lose("merge-worker-0")
    it.step(3)
    assert [worker for worker, _ in it.workers.finishing] == ["merge-worker-0", "merge-worker-1"]
    it.workers.lose("merge-worker-1")
    it.step()
    assert (it.job("one").worker_losses, it.states()) == (1, {"one": JobState.RETRY_WAIT})


def test_a_pass_that_kills_the_next_who_has_it_alone_is_charged(fleet):
    it = shared(fleet, "one", num_pieces=8)
    it.workers.lose("merge-worker-1")
    for worker in ("merge-worker-0", "merge-worker-2"):
        it.workers.merge(worker, "one")
    it.step(2)
    assert list(it.workers.busy) == ["merge-worker-0"]
    it.workers.lose("merge-worker-0")  # at other pieces than the first
    it.step()
    assert (it.job("one").worker_losses, it.job("one").state) == (1, JobState.RETRY_WAIT)
    it.step()
    assert {("merge-worker-1", "one"), ("merge-worker-2", "one")} <= set(it.workers.discarded)


def test_workers_that_die_together_end_a_pass_and_are_charged_to_no_job(fleet):
    it = shared(fleet, "one")
    for worker in ("merge-worker-1", "merge-worker-2"):  # a machine is gone
        it.workers.lose(worker)
    it.step()
    assert (it.states(), it.job("one").worker_losses, it.job("one").attempts) == ({"one": JobState.QUEUED}, 0, 0)
    it.step(2)
    assert it.workers.units[-1][2] == ("one",)


@pytest.mark.parametrize("num_workers", [4, 16])
def test_a_job_that_kills_every_worker_costs_a_fleet_four_of_them_however_large_it_is(fleet, num_workers):
    it = fleet(num_workers=num_workers)
    it.submit(request("poison"))
    it.step()
    it.workers.begin("merge-worker-0", "poison", num_pieces=2 * num_workers)
    it.step(2)
    for worker in ("merge-worker-0", "merge-worker-1"):
        it.workers.lose(worker)
        it.step(2)
    for _ in range(2):  # max_worker_losses
        worker, _, jobs = it.workers.units[-1]
        assert jobs == ("poison",)
        it.workers.lose(worker)
        it.step(2)
    assert it.states() == {"poison": JobState.QUARANTINED}


def test_a_worker_that_dies_while_it_opens_a_pass_ends_the_attempt(fleet):
    it = fleet(num_workers=2)
    it.submit(request("one"))
    it.step()
    it.workers.lose("merge-worker-0")
    it.step()
    assert it.job("one").worker_losses == 1


def test_a_worker_that_cannot_take_part_gets_no_more_of_it(fleet):
    it = shared(fleet, "one")
    it.workers.refuse("merge-worker-1")
    it.step(2)
    assert [worker for worker, _ in it.workers.given] == ["merge-worker-0", "merge-worker-1", "merge-worker-2"]
    it.workers.merge("merge-worker-0", "one")
    it.step(2)
    assert it.workers.given[-1] == ("merge-worker-0", ("shard-1",))
    assert it.states() == {"one": JobState.PLANNING}


def test_when_the_leader_cannot_go_on_a_helper_leads(fleet):
    it = shared(fleet, "one", num_pieces=3)
    it.workers.lose("merge-worker-0")
    it.step(2)
    it.workers.merge("merge-worker-1", "one")
    it.workers.merge("merge-worker-2", "one")
    it.step(2)
    assert it.workers.given[-1] == ("merge-worker-0", ("shard-0",))
    it.workers.refuse("merge-worker-0")  # the one in its place
    it.step(2)
    assert it.workers.given[-1] == ("merge-worker-1", ("shard-0",))
    it.workers.merge("merge-worker-1", "one")
    it.step(2)
    assert [worker for worker, _ in it.workers.finishing] == ["merge-worker-1"]
    it.workers.finish("merge-worker-1", staged("one"))
    it.step()
    assert it.workers.published == [("merge-worker-1", "one")]


def test_a_pass_whose_leader_is_not_replaced_is_finished_by_another(fleet):
    it = shared(fleet, "one", num_pieces=3)
    it.workers.lose("merge-worker-0")
    it.workers.unfit["merge-worker-0"] = "ECC error"
    it.workers.merge("merge-worker-1", "one")
    it.step(2)
    assert [event.reason for event in it.events if isinstance(event, WorkerBenched)] == ["here: ECC error"]
    it.workers.merge("merge-worker-2", "one")
    it.step(2)
    it.workers.merge(it.workers.given[-1][0], "one")
    it.step(2)
    [(worker, merged)] = it.workers.finishing
    assert worker != "merge-worker-0"
    assert sorted(merged["one"]) == [("shard-0",), ("shard-1",), ("shard-2",)]
    it.workers.finish(worker, staged("one"))
    it.step()
    it.workers.finish_publish(worker, "one")
    it.step(2)
    assert it.states() == {"one": JobState.PUBLISHED}
    assert (it.job("one").attempts, it.job("one").worker_losses) == (1, 0)


def test_a_pass_whose_kind_of_worker_is_gone_begins_anew_on_another_kind(fleet):
    it = fleet(num_workers=3, num_gpus=2)
    it.submit(request("one"))
    it.step()
    it.workers.begin("merge-worker-0", "one", num_pieces=2)
    it.step(2)
    it.workers.merge("merge-worker-1", "one")
    it.step(2)
    for worker in ("merge-worker-1", "merge-worker-0"):
        it.workers.down.add(worker)
        it.workers.lose(worker)
        it.clock.now += 1  # the first one is idle, and is missed when it is asked how it is doing
        it.step()
    it.step(2)
    assert (it.states(), it.workers.units) == ({"one": JobState.PLANNING}, [])  # they may come back
    it.clock.now += 200
    it.step(2)
    assert it.workers.units[-1][::2] == ("merge-worker-2", ("one",))
    assert (it.job("one").attempts, it.job("one").worker_losses) == (1, 0)
    assert it.store.events("one")[-3].detail["reason"] == "no worker of the kind that began it is left"


def test_a_pass_that_nobody_can_go_on_with_is_tried_again(fleet):
    it = shared(fleet, "one", num_workers=2, num_pieces=1)
    it.workers.lose("merge-worker-0")
    it.step(2)
    assert it.workers.given[-1] == ("merge-worker-1", ("shard-0",))
    it.workers.refuse("merge-worker-1")
    it.step(2)
    assert it.workers.given[-1] == ("merge-worker-0", ("shard-0",))  # the one in the place of the first
    it.workers.refuse("merge-worker-0")
    it.step()
    assert it.job("one").worker_losses == 1
    assert it.states() == {"one": JobState.RETRY_WAIT}


def test_a_fleet_with_jobs_for_everybody_shares_nothing(fleet):
    it = fleet(num_workers=2, max_jobs_per_pass=4)
    it.submit(request("one"), request("two"))
    it.step()
    assert it.workers.opened == []
    assert len(it.workers.units) == 2


def test_a_job_that_fails_while_a_pass_is_opened_is_not_merged(fleet):
    it = fleet(num_workers=2)
    it.submit(request("one"))
    it.step()
    it.workers.begin("merge-worker-0", ended=(failed("one", FailureClass.BAD_INPUT),))
    it.step()
    assert it.states() == {"one": JobState.FAILED}
    assert it.workers.given == []


def test_a_cancelled_job_stops_on_every_worker(fleet):
    it = shared(fleet, "one")
    it.store.cancel(["one"])
    it.step()
    assert {worker for worker, _ in it.workers.cancelled} == {"merge-worker-0", "merge-worker-1", "merge-worker-2"}
    assert it.states() == {"one": JobState.CANCELLED}
    it.workers.merge("merge-worker-1", ended=(failed("one", FailureClass.CANCELLED),))
    it.workers.merge("merge-worker-0", "one")
    it.step(2)
    assert it.workers.discarded == [("merge-worker-0", "one")]  # the other one has let go of it by itself
    told = len(it.workers.cancelled)
    it.step()
    assert it.workers.cancelled[told:] == [("merge-worker-2", ("one",))]


def test_a_driver_that_stops_gives_shared_passes_back(fleet):
    it = shared(fleet, "one")
    it.driver.stop()
    it.step()
    for worker in ("merge-worker-0", "merge-worker-1", "merge-worker-2"):
        it.workers.merge(worker, "one")
    it.step(2)
    # Nobody is at it any more, and a shard is left: it is not handed out.
    assert it.states() == {"one": JobState.QUEUED}
    assert it.job("one").attempts == 0
    assert len(it.workers.given) == 3


def test_a_shared_pass_tells_how_far_all_are(fleet):
    it = shared(fleet, "one")
    for worker, done in (("merge-worker-0", 100), ("merge-worker-1", 50)):
        progress = Progress(unit="u", stages={"one": "merge"}, bytes_done=done, bytes_total=200)
        it.workers.progress[worker] = progress
    it.clock.now += 1
    it.step()
    record = it.job("one")
    assert (record.state, record.bytes_done, record.bytes_total) == (JobState.MERGING, 150, 800)


def test_an_exception_in_a_piece_is_a_fault(fleet):
    it = shared(fleet, "one")
    it.workers.fail("merge-worker-1", ValueError("boom"))
    it.step(2)
    assert it.states() == {"one": JobState.FAILED}


def test_jobs_that_wait_go_before_help(fleet):
    it = shared(fleet, "one", num_workers=2)
    it.submit(request("two", base="/bases/b"))
    it.workers.merge("merge-worker-1", "one")
    it.step(2)
    assert [worker for worker, _, _ in it.workers.units] == ["merge-worker-1"]


def test_releases_are_written_down_together_and_in_time(fleet, monkeypatch):
    it = fleet(num_workers=2)
    it.submit(request("one"), request("two", base="/bases/b"))
    it.step()
    written = []
    really = it.store.settle
    monkeypatch.setattr(it.store, "settle", lambda each: written.append(len(each)) or really(each))
    for worker, name in (("merge-worker-0", "one"), ("merge-worker-1", "two")):
        it.workers.finish(worker, staged(name))
    it.driver.step()
    for worker, name in (("merge-worker-0", "one"), ("merge-worker-1", "two")):
        it.workers.finish_publish(worker, name)
        it.driver.step()  # no time passes, and something happens in every round
    assert written == []
    it.step()
    assert written == [2]
    assert set(it.states().values()) == {JobState.PUBLISHED}


def test_a_release_that_cannot_be_stored_is_the_failure_of_its_job_alone(fleet, monkeypatch):
    it = fleet()
    it.submit(request("one"), request("two"))
    it.step()
    it.workers.finish("merge-worker-0", staged("one"), staged("two"))
    it.step()
    really = it.store.settle

    def settle_all(publications):
        if any(each.job_id == "one" for each in publications):
            raise ValueError("no such thing")
        return really(publications)

    monkeypatch.setattr(it.store, "settle", settle_all)
    for name in ("one", "two"):
        it.workers.finish_publish("merge-worker-0", name)
    it.step(2)
    assert it.states() == {"one": JobState.FAILED, "two": JobState.PUBLISHED}
