"""What the scheduler promises, over random jobs and workers and in simulations of whole batches."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler import Limits, WaitingJob, WorkerView, schedule

KEYS = ["a", "b", "c", "d"]


def job(number, key="a", priority=0, *, alone=False):
    return WaitingJob(job_id=f"job-{number}", pass_key=key, priority=priority, sequence=number, alone=alone)


def worker(number, *residents, idle=True):
    return WorkerView(name=f"merge-worker-{number}", idle=idle, residents=frozenset(residents))


def limits(per_pass=4, others=3):
    return Limits(max_jobs_per_pass=per_pass, max_units_of_other_bases=others)


def assigned(result):
    return {unit.worker: (unit.pass_key, unit.job_ids) for unit in result.units}


@st.composite
def batches(draw, max_jobs=24):
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=max_jobs))
    return [
        job(number, key, draw(st.integers(-2, 2)), alone=draw(st.integers(0, 5)) == 0)
        for number, key in enumerate(keys)
    ]


fleets = st.lists(st.tuples(st.booleans(), st.sets(st.sampled_from(KEYS), max_size=2)), min_size=1, max_size=4).map(
    lambda fleet: [worker(number, *held, idle=idle) for number, (idle, held) in enumerate(fleet)]
)
bounds = st.builds(limits, st.integers(1, 5), st.integers(0, 4))
histories = st.dictionaries(st.sampled_from(KEYS), st.integers(0, 6))


@given(batches(), fleets, histories, bounds)
def test_every_schedule_keeps_the_rules(jobs, workers, passed_over, bound):
    result = schedule(jobs, workers, passed_over, bound)
    by_id = {each.job_id: each for each in jobs}
    placed = [job_id for unit in result.units for job_id in unit.job_ids]
    idle = {each.name for each in workers if each.idle}

    assert len(placed) == len(set(placed))
    assert set(placed) <= set(by_id)
    assert {unit.worker for unit in result.units} <= idle
    assert len({unit.worker for unit in result.units}) == len(result.units)
    for unit in result.units:
        assert 1 <= len(unit.job_ids) <= bound.max_jobs_per_pass
        assert {by_id[job_id].pass_key for job_id in unit.job_ids} == {unit.pass_key}
        assert len(unit.job_ids) == 1 or not any(by_id[job_id].alone for job_id in unit.job_ids)
    left = set(by_id) - set(placed)
    assert not left or len(result.units) == len(idle)
    assert set(result.passed_over) == {by_id[job_id].pass_key for job_id in left}


@given(batches(), fleets, histories, bounds, st.randoms(use_true_random=False))
def test_the_order_of_the_arguments_does_not_matter(jobs, workers, passed_over, bound, rng):
    expected = schedule(jobs, workers, passed_over, bound)
    rng.shuffle(jobs)
    rng.shuffle(workers)
    assert schedule(jobs, workers, passed_over, bound) == expected


@given(batches(), fleets, bounds)
def test_an_idle_worker_is_left_without_work_only_when_no_unit_can_be_split(jobs, workers, bound):
    result = schedule(jobs, workers, {}, bound)
    if len(result.units) < sum(each.idle for each in workers):
        assert all(len(unit.job_ids) == 1 for unit in result.units)


@settings(deadline=None)
@given(batches(max_jobs=60), st.integers(1, 3), bounds, st.randoms(use_true_random=False))
def test_no_base_waits_longer_than_the_bound(jobs, num_workers, bound, rng):
    """A whole batch: workers get free in random order and keep what they ran last; jobs arrive as it goes on."""
    arriving = list(jobs)
    waiting, passed_over = [], {}
    workers = {f"merge-worker-{n}": worker(n) for n in range(num_workers)}
    since = {}  # key -> units of other bases started while it waited, and the oldest job it waited with
    while arriving or waiting:
        num_arriving = rng.randint(0, 6)
        waiting += arriving[:num_arriving]
        arriving = arriving[num_arriving:]
        free = rng.sample(sorted(workers), rng.randint(1, num_workers))
        views = [dataclasses.replace(workers[name], idle=name in free) for name in sorted(workers)]
        result = schedule(waiting, views, passed_over, bound)
        passed_over = result.passed_over
        for unit in result.units:
            waiting_keys = {each.pass_key for each in waiting}
            for key in waiting_keys - {unit.pass_key}:
                since[key] = since.get(key, 0) + 1
                # Bases that are overdue at the same time can only go one after the other.
                assert since[key] <= bound.max_units_of_other_bases + len(KEYS) - 1
            if since.pop(unit.pass_key, 0) >= bound.max_units_of_other_bases:
                oldest = min((each.sequence, each.job_id) for each in waiting if each.pass_key == unit.pass_key)[1]
                assert any(oldest in each.job_ids for each in result.units)
            waiting = [each for each in waiting if each.job_id not in unit.job_ids]
            workers[unit.worker] = dataclasses.replace(workers[unit.worker], residents=frozenset({unit.pass_key}))


def test_jobs_of_one_base_share_a_pass():
    result = schedule([job(0), job(1, "b"), job(2), job(3)], [worker(0)], {}, limits())
    assert assigned(result) == {"merge-worker-0": ("a", ("job-0", "job-2", "job-3"))}
    assert result.passed_over == {"b": 1}


def test_a_free_worker_keeps_the_base_it_holds():
    result = schedule([job(0, "a"), job(1, "b")], [worker(0, "b")], {}, limits())
    assert assigned(result) == {"merge-worker-0": ("b", ("job-1",))}


def test_priority_goes_before_residency():
    result = schedule([job(0, "a"), job(1, "b", priority=1)], [worker(0, "a")], {}, limits())
    assert assigned(result) == {"merge-worker-0": ("b", ("job-1",))}


def test_a_base_that_waited_long_enough_goes_before_residency_and_priority():
    jobs = [job(0, "a"), job(1, "b", priority=5), job(2, "b", priority=5)]
    result = schedule(jobs, [worker(0, "b")], {"a": 3}, limits(others=3))
    assert assigned(result) == {"merge-worker-0": ("a", ("job-0",))}


def test_each_base_goes_to_the_worker_that_holds_it():
    result = schedule([job(0, "a"), job(1, "b")], [worker(0, "b"), worker(1, "a")], {}, limits())
    assert assigned(result) == {"merge-worker-0": ("b", ("job-1",)), "merge-worker-1": ("a", ("job-0",))}


def test_a_new_base_goes_to_the_worker_whose_own_is_not_wanted():
    jobs = [job(0, "c", priority=1), job(1, "a")]
    result = schedule(jobs, [worker(0, "a"), worker(1, "d")], {}, limits())
    assert assigned(result) == {"merge-worker-0": ("a", ("job-1",)), "merge-worker-1": ("c", ("job-0",))}


def test_a_pass_is_split_when_it_would_leave_a_worker_idle():
    result = schedule([job(n) for n in range(4)], [worker(0), worker(1)], {}, limits())
    assert assigned(result) == {
        "merge-worker-0": ("a", ("job-0", "job-1")),
        "merge-worker-1": ("a", ("job-2", "job-3")),
    }


def test_a_pass_is_not_split_when_everybody_has_work():
    result = schedule([job(0), job(1), job(2, "b")], [worker(0), worker(1)], {}, limits())
    assert assigned(result) == {"merge-worker-0": ("a", ("job-0", "job-1")), "merge-worker-1": ("b", ("job-2",))}


def test_a_job_that_has_cost_workers_runs_alone():
    result = schedule([job(0, alone=True), job(1), job(2)], [worker(0)], {}, limits())
    assert assigned(result) == {"merge-worker-0": ("a", ("job-0",))}
