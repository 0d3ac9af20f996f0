"""How far a batch is, from what the store says of its jobs."""

import dataclasses

import pytest

from cluster.console.progress import Batch, ByteClock, by_base
from jobs.errors import FailureClass
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import Decision, JobState
from tests.releases import progress_of


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
        store.advance({lease.job_id: lease.token}, JobState.PLANNING)
        store.report_progress(progress_of({lease.job_id: lease.token}, stage="plan", bytes_done=50, bytes_total=total))
    [progress] = by_base(store.jobs())
    assert (progress.name, progress.num_jobs, progress.num_final) == ("a (nf4)", 3, 0)
    assert (progress.bytes_done, progress.bytes_total) == (100, 600)
    assert progress.stages == {"plan": 2, "queued": 1}


def test_bases_and_quantizations_have_their_own_bars(store):
    submit(store, "one")
    submit(store, "two", base_quantization="none")
    submit(store, "three", base="/bases/b")
    assert [each.name for each in by_base(store.jobs())] == ["a (nf4)", "a", "b (nf4)"]
    assert all(each.bytes_total is None for each in by_base(store.jobs()))


def test_a_final_job_counts_as_done_however_it_ended(store):
    submit(store, "one", "two")
    [lease, _] = store.claim("driver", 2, 60)
    store.report_progress(progress_of({lease.job_id: lease.token}, stage="plan", bytes_done=10, bytes_total=100))
    store.fail(lease.job_id, lease.token, FailureClass.BAD_INPUT, "no", Decision(state=JobState.FAILED))
    [progress] = by_base(store.jobs())
    assert (progress.num_final, progress.bytes_done, progress.bytes_total) == (1, 100, 200)


def test_time_left_comes_from_the_bytes_that_went_by(store):
    submit(store, "one")
    [progress] = by_base(store.jobs())
    clock = ByteClock()
    at = {"bytes_total": 1000}
    assert clock.seconds_left(0.0, [progress]) is None
    assert clock.seconds_left(10.0, [dataclasses.replace(progress, bytes_done=0, **at)]) is None
    assert clock.seconds_left(20.0, [dataclasses.replace(progress, bytes_done=200, **at)]) == 80.0
    assert clock.seconds_left(30.0, [dataclasses.replace(progress, bytes_done=100, **at)]) is None, "begun anew"


def test_a_batch_is_what_was_not_final_when_first_seen(store):
    submit(store, "old")
    store.cancel(["old"])
    submit(store, "one")
    batch = Batch(store)
    assert [record.id for record in batch.refresh()] == ["one"]
    submit(store, "two")
    store.cancel(["one"])
    assert {record.id: record.state for record in batch.refresh()} == {
        "one": JobState.CANCELLED,
        "two": JobState.QUEUED,
    }
