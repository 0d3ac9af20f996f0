"""How far a batch is, from what the store says of its jobs."""

import dataclasses

import pytest

from cluster.console.progress import ByteClock, by_base
from jobs.errors import FailureClass
from jobs.ledger.causes import group_failures
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import Decision, JobState
from tests.releases import begin, progress_of


@pytest.fixture
def store(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    yield store
    store.close()


def submit(store, *names, base="/bases/a", **fields):
    store.submit(
        [
            MergeRequest(id=name, base=base, adapter=f"/adapters/{name}", destination=f"/releases/{name}", **fields)
            for name in names
        ]
    )


def test_jobs_not_planned_yet_count_with_the_mean_of_their_base(store):
    submit(store, "one", "two", "three")
    leases = store.claim("driver", 2, 60)
    for lease, total in zip(leases, (100, 300), strict=True):
        begin(store, lease.job_id, lease.token)
        store.report_progress(progress_of({lease.job_id: lease.token}, stage="plan", bytes_done=50, bytes_total=total))
    [progress] = by_base(store.work())
    assert (progress.name, progress.num_jobs, progress.num_final) == ("a", 3, 0)
    assert (progress.bytes_done, progress.bytes_total) == (100, 600)
    assert progress.stages == {"plan": 2, "queued": 1}


def test_bases_have_their_own_bars(store):
    submit(store, "one")
    submit(store, "two", base_quantization="none")
    submit(store, "three", base="/bases/b")
    assert [(each.name, each.num_jobs) for each in by_base(store.work())] == [("a", 2), ("b", 1)]
    assert all(each.bytes_total is None for each in by_base(store.work()))


def test_a_final_job_counts_as_done_however_it_ended(store):
    submit(store, "one", "two")
    [lease, _] = store.claim("driver", 2, 60)
    store.report_progress(progress_of({lease.job_id: lease.token}, stage="plan", bytes_done=10, bytes_total=100))
    store.fail(lease.job_id, lease.token, FailureClass.BAD_INPUT, "no", Decision(state=JobState.FAILED))
    [progress] = by_base(store.work())
    assert (progress.num_final, progress.bytes_done, progress.bytes_total) == (1, 100, 200)


def test_time_left_comes_from_the_bytes_that_went_by(store):
    submit(store, "one")
    [progress] = by_base(store.work())
    clock = ByteClock()
    at = {"bytes_total": 1000}
    assert clock.seconds_left(0.0, [progress]) is None
    assert clock.seconds_left(10.0, [dataclasses.replace(progress, bytes_done=0, **at)]) is None
    assert clock.seconds_left(20.0, [dataclasses.replace(progress, bytes_done=200, **at)]) == 80.0
    assert clock.seconds_left(30.0, [dataclasses.replace(progress, bytes_done=100, **at)]) is None, "begun anew"


def test_what_is_watched_is_what_was_not_final_at_first_and_what_came_of_it(store):
    submit(store, "old")
    store.cancel(["old"])
    submit(store, "one")
    watched = Selection(unfinished_at=store.now())
    assert [each.num_jobs for each in by_base(store.work(watched))] == [1]
    submit(store, "two")
    store.cancel(["one"])
    [progress] = by_base(store.work(watched))
    assert (progress.num_jobs, progress.num_final, progress.stages) == (2, 1, {"cancelled": 1, "queued": 1})


def test_failures_are_grouped_by_cause():
    failures = [
        ("a", FailureClass.BAD_INPUT, "adapter /x/a has 3 tensors too many: 'layers.1.q'"),
        ("b", FailureClass.BAD_INPUT, "adapter s3://b/b has 12 tensors too many: 'layers.7.v'"),
        ("c", FailureClass.NOT_FOUND, "there is no adapter in /x/c"),
        ("d", FailureClass.BAD_INPUT, "adapter /x/d has 1 tensors too many: 'layers.0.q'"),
        ("e", FailureClass.AUTH, "there is no adapter in /x/c"),
    ]
    groups = group_failures(failures)
    assert [(group.num_jobs, group.failure_class, group.ids) for group in groups] == [
        (3, FailureClass.BAD_INPUT, ("a", "b", "d")),
        (1, FailureClass.NOT_FOUND, ("c",)),
        (1, FailureClass.AUTH, ("e",)),
    ]
    assert groups[0].message == failures[0][2]
