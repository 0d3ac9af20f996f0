"""What every pool does, wherever its workers run: in memory, and on Ray."""

import dataclasses
import os
import time

import pytest

from cluster.driving.replies import (
    CallFailed,
    PassBegun,
    ProgressSeen,
    PublishFinished,
    ShardsMerged,
    TurnedDown,
    UnitFinished,
    WorkerLost,
    WorkerUnfit,
)
from cluster.fleet.actors import ActorGoneError
from cluster.fleet.in_memory import InMemoryActors, ThreadActor
from cluster.fleet.pool import WorkerPool
from cluster.ray_fleet.actors import RayActors
from jobs.errors import FailureClass, WorkerLostError
from tests.sleeping import CREW, BrokenWorker, SleepingWorker, last, ready, request, until
from workers.merging.outcomes import PassWork

ONE = dataclasses.replace(CREW, num_workers=1)


def vanish():
    raise ActorGoneError("it died")


def end_process():
    os._exit(1)


@pytest.fixture(scope="module", params=["memory", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])])
def actors(request):
    """Return what makes the actors of a class, and how a worker of theirs dies."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
        return RayActors, end_process

    def in_memory(worker_class, arguments):
        return InMemoryActors(lambda _name, crew: ThreadActor(worker_class, *arguments(crew)))

    return in_memory, vanish


@pytest.fixture
def make_pool(actors, tmp_path):
    make_actors, die = actors
    pools = []

    def make(worker_class=SleepingWorker, crews=(CREW,), needs=lambda _crew: None, **options):
        def arguments(crew):
            return str(tmp_path), die, needs(crew)

        pools.append(WorkerPool(make_actors(worker_class, arguments), crews, **{"ping_seconds": 0.1, **options}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_a_unit_runs_and_is_published(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-1", "merge:b:1 adapter", (request(),))
    assert [view.idle for view in pool.views()] == [True, False]
    outcome = last(until(pool, UnitFinished), UnitFinished).outcome
    assert outcome.jobs[0].job_id == "one"
    assert pool.views()[1].residents == {request().pass_key()}
    pool.publish("merge-worker-1", "one", "someone")
    pool.discard("merge-worker-1", "one")
    assert last(until(pool, PublishFinished), PublishFinished).outcome.job_id == "one"


def test_a_pass_goes_through_several_workers(make_pool):
    pool = make_pool()
    ready(pool)
    pool.open_pass("merge-worker-0", "p", "plan:b:1 adapter", (request(),))
    assert [view.idle for view in pool.views()] == [False, True]
    begun = last(until(pool, PassBegun), PassBegun)
    assert (begun.worker, begun.pass_id) == ("merge-worker-0", "p")
    work = PassWork(pass_id="p", name="merge:b", requests=(request(),), tickets=begun.outcome.tickets)
    pool.merge_shards("merge-worker-1", work, frozenset(begun.outcome.pieces[0].shards))
    merged = last(until(pool, ShardsMerged), ShardsMerged)
    assert (merged.worker, merged.pass_id) == ("merge-worker-1", "p")
    assert merged.outcome.merged["one"].checks == ("model.safetensors",)
    assert pool.views()[1].residents == {"held"}
    pool.finish_pass("merge-worker-0", work, {"one": (merged.outcome.merged["one"],)})
    assert last(until(pool, UnitFinished), UnitFinished).outcome.jobs[0].job_id == "one"
    pool.merge_shards("merge-worker-1", dataclasses.replace(work, requests=(request(elsewhere="1"),)), frozenset())
    refused = last(until(pool, TurnedDown), TurnedDown)
    assert (refused.worker, refused.pass_id, refused.reason) == ("merge-worker-1", "p", "not to be seen from here")


def test_progress_and_cancellation_reach_a_worker_at_work(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "merge:b:1 adapter", (request(seconds="60"),))
    while (progress := last(until(pool, ProgressSeen), ProgressSeen).progress).unit == "":
        pass  # asked before the unit had begun
    assert progress.unit == "merge:b:1 adapter"
    pool.cancel("merge-worker-0", ["one"])
    outcome = last(until(pool, UnitFinished), UnitFinished).outcome
    assert outcome.jobs[0].failure.failure_class is FailureClass.CANCELLED


def test_a_worker_that_dies_is_told_and_replaced_under_its_name(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "u", (request(dies="1"),))
    lost = last(until(pool, WorkerLost), WorkerLost)
    assert (lost.worker, lost.device_failed) == ("merge-worker-0", False)
    assert "died" in lost.reason
    ready(pool)
    pool.run_unit("merge-worker-0", "u", (request("two"),))
    assert last(until(pool, UnitFinished), UnitFinished).worker == "merge-worker-0"


def test_a_spare_takes_over_at_once_and_who_comes_back_stands_by(make_pool):
    later = [0.0]
    pool = make_pool(num_spares=1, clock=lambda: time.monotonic() + later[0])
    ready(pool)
    assert [view.up for view in pool.views()] == [True, True, False]
    later[0] = 31.0  # none is started before
    wait_for(pool, "merge-worker-2")
    assert [(view.idle, view.up) for view in pool.views()] == [(True, True), (True, True), (False, False)]
    pool.run_unit("merge-worker-0", "u", (request(dies="1"),))
    until(pool, WorkerLost)
    assert [(view.idle, view.up) for view in pool.views()] == [(False, False), (True, True), (True, True)]
    pool.run_unit("merge-worker-2", "u", (request("two"),))
    assert last(until(pool, UnitFinished), UnitFinished).worker == "merge-worker-2"
    wait_for(pool, "merge-worker-0")
    assert [view.up for view in pool.views()] == [False, True, True]


def wait_for(pool, name):
    """Poll until a worker has started."""
    end = time.monotonic() + 60
    while not pool._members[name].ready:
        assert time.monotonic() < end
        pool.poll(0.2)


def test_a_worker_that_does_not_answer_is_ended_and_replaced(make_pool):
    pool = make_pool(unresponsive_seconds=1.0)
    ready(pool)
    pool.run_unit("merge-worker-0", "silent", (request(seconds="4"),))
    lost = last(until(pool, WorkerLost, seconds=10), WorkerLost)
    assert (lost.worker, lost.reason) == ("merge-worker-0", "no answer for 1 s")
    ready(pool)


def test_an_exception_out_of_a_worker_is_an_event(make_pool):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "u", (request(**{"raise": "what now"}),))
    failed = last(until(pool, CallFailed), CallFailed)
    assert (failed.call, failed.job_id, failed.message) == ("run_unit", None, "what now")
    pool.publish("merge-worker-0", "raises", None)
    failed = last(until(pool, CallFailed), CallFailed)
    assert (failed.call, failed.job_id, failed.message) == ("publish", "raises", "no such job")
    assert all(view.idle for view in pool.views())


def test_workers_that_never_start_end_the_driver_with_the_reason(make_pool):
    pool = make_pool(BrokenWorker)
    with pytest.raises(WorkerLostError, match="no space left on device"):
        ready(pool)


def test_a_worker_that_cannot_use_its_gpu_gets_no_work_is_told_once_and_tried_again(make_pool, tmp_path):
    mended = tmp_path / "mended"
    pool = make_pool(
        crews=(ONE, dataclasses.replace(ONE, num_threads=1)),
        needs=lambda crew: mended if crew is ONE else None,
    )
    unfit = last(until(pool, WorkerUnfit), WorkerUnfit)
    assert (unfit.worker, unfit.reason) == ("merge-worker-0", "gpu-7: device 'cuda' cannot be used: ECC error")
    ready(pool, num=1)
    end = time.monotonic() + 6
    while time.monotonic() < end:  # longer than it takes to fail again, with pauses of 1 s and 2 s
        assert not [event for event in pool.poll(0.2) if isinstance(event, WorkerUnfit | WorkerLost)]
    assert [(view.idle, view.up) for view in pool.views()] == [(False, False), (True, True)]
    mended.touch()
    ready(pool)
    # One whose GPU fails at work is lost with what it did, and its place rests before it is filled again.
    pool.run_unit("merge-worker-0", "u", (request(breaks="1"),))
    lost = last(until(pool, WorkerLost), WorkerLost)
    assert (lost.worker, lost.reason) == ("merge-worker-0", "the GPU failed at work")
    ready(pool)


def test_closing_lets_a_worker_finish_its_unit_and_sweep(make_pool, tmp_path):
    pool = make_pool()
    ready(pool)
    pool.run_unit("merge-worker-0", "u", (request(seconds="0.5"),))
    pool.close()
    assert len(list(tmp_path.glob("closed-*"))) == CREW.num_workers


def test_closing_lets_idle_workers_sweep(make_pool, tmp_path):
    pool = make_pool()
    ready(pool)
    pool.close()
    assert len(list(tmp_path.glob("closed-*"))) == CREW.num_workers
