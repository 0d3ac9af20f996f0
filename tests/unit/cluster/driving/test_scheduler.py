"""What the scheduler promises, over random jobs and workers and in simulations of whole batches."""

import dataclasses
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.driving.scheduler import Limits, OpenPass, WaitingJob, WorkerView, in_turn, schedule, share_out

KEYS = ["a", "b", "c", "d"]


def job(number, key="a", priority=0, *, alone=False, share=""):
    return WaitingJob(
        job_id=f"job-{number}", pass_key=key, priority=priority, sequence=number, alone=alone, share=share
    )


def worker(number, *residents, idle=True, device="cpu"):
    return WorkerView(name=f"merge-worker-{number}", idle=idle, residents=frozenset(residents), device=device)


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


def test_a_worker_whose_gpu_failed_comes_last():
    fleet = [
        dataclasses.replace(worker(0, device="cuda"), has_failed=True),
        worker(1, "other", device="cuda"),
        worker(2),
    ]
    waiting = [job(number, key) for number, key in enumerate("abc")]
    chosen = [schedule(waiting[:number], fleet, {}, limits()).units[-1].worker for number in (1, 2, 3)]
    assert chosen == ["merge-worker-1", "merge-worker-2", "merge-worker-0"]


def test_a_job_does_not_go_back_to_the_gpu_that_failed_under_it_where_there_is_another():
    again = dataclasses.replace(job(0), not_on=frozenset({"merge-worker-0"}), alone=True)
    busy = worker(1, idle=False)
    other = job(1, "b")
    assert assigned(schedule([again], [worker(0), busy], {}, limits())) == {}
    assert assigned(schedule([again, other], [worker(0), busy], {}, limits())) == {"merge-worker-0": ("b", ("job-1",))}
    assert assigned(schedule([again], [worker(0), worker(1)], {}, limits())) == {"merge-worker-1": ("a", ("job-0",))}
    gone = dataclasses.replace(busy, up=False)
    assert assigned(schedule([again], [worker(0), gone], {}, limits())) == {"merge-worker-0": ("a", ("job-0",))}


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


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(batches(max_jobs=60), st.integers(1, 3), bounds, st.integers(0, 10**6))
def test_no_base_waits_longer_than_the_bound(jobs, num_workers, bound, seed):
    """A whole batch: workers get free in random order and keep what they ran last; jobs arrive as it goes on."""
    rng = random.Random(seed)  # one drawn by Hypothesis takes most of the time
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


def test_a_job_that_lost_its_worker_goes_before_others_of_its_priority():
    waiting = [job(0), job(1), job(2, priority=1), job(3, alone=True)]
    assert [each.job_id for each in in_turn(waiting)] == ["job-2", "job-3", "job-0", "job-1"]
    assert assigned(schedule(waiting[:2] + waiting[3:], [worker(0)], {}, limits())) == {
        "merge-worker-0": ("a", ("job-3",))
    }


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


def test_gpus_get_work_first_and_the_rest_what_they_cannot_take():
    workers = [worker(0, "a"), worker(1, device="cuda")]
    assert assigned(schedule([job(0)], workers, {}, limits())) == {"merge-worker-1": ("a", ("job-0",))}
    both = assigned(schedule([job(n) for n in range(6)], workers, {}, limits()))
    assert both == {
        "merge-worker-1": ("a", ("job-0", "job-1", "job-2", "job-3")),
        "merge-worker-0": ("a", ("job-4", "job-5")),
    }


def test_a_pass_is_neither_split_nor_shared_between_a_gpu_and_a_cpu():
    result = schedule([job(0), job(1)], [worker(0), worker(1, device="cuda"), worker(2)], {}, limits())
    assert [(unit.worker, unit.job_ids, unit.shared) for unit in result.units] == [
        ("merge-worker-1", ("job-0", "job-1"), False)
    ]
    gpus = [worker(n, device="cuda") for n in (1, 2, 3)]
    result = schedule([job(0), job(1)], [worker(0), *gpus], {}, limits())
    assert [(unit.worker, unit.job_ids, unit.shared) for unit in result.units] == [
        ("merge-worker-1", ("job-0",), True),
        ("merge-worker-2", ("job-1",), True),
    ]


def test_pieces_go_to_workers_of_the_kind_of_their_leader():
    shared = open_pass("p", [10] * 8, leader="merge-worker-1", device="cuda")
    workers = [worker(0), *(worker(n, device="cuda") for n in (1, 2)), worker(3)]
    assert {each.worker for each in share_out([shared], workers)} == {"merge-worker-1", "merge-worker-2"}


def open_pass(name, sizes, *, leader=None, key="a", at_work=(), barred=(), device="cpu"):
    return OpenPass(
        pass_id=name,
        pass_key=key,
        leader=leader or f"leader-{name}",
        piece_bytes=tuple(sizes),
        at_work=frozenset(at_work),
        barred=frozenset(barred),
        device=device,
    )


@given(
    st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=12), min_size=1, max_size=3),
    st.lists(st.tuples(st.booleans(), st.sets(st.sampled_from(KEYS), max_size=2)), min_size=1, max_size=6),
    st.data(),
)
def test_pieces_go_to_idle_workers_as_long_as_there_are_any(sizes, fleet, data):
    workers = [worker(number, *held, idle=idle) for number, (idle, held) in enumerate(fleet)]
    names = [each.name for each in workers]
    barred = [data.draw(st.sets(st.sampled_from(names), max_size=2)) for _ in sizes]
    passes = [open_pass(str(n), each, barred=barred[n]) for n, each in enumerate(sizes)]
    given_out = share_out(passes, workers)
    assert share_out(passes, workers) == given_out
    assert len({each.worker for each in given_out}) == len(given_out)
    left = {each.pass_id: len(each.piece_bytes) for each in passes}
    for each in given_out:
        assert each.num_pieces >= 1
        left[each.pass_id] -= each.num_pieces
        assert each.worker not in next(p.barred for p in passes if p.pass_id == each.pass_id)
    assert all(count >= 0 for count in left.values())
    idle = {each.name for each in workers if each.idle}
    assert {each.worker for each in given_out} <= idle
    for name in idle - {each.worker for each in given_out}:
        assert not any(left[each.pass_id] and name not in each.barred for each in passes)


def test_all_who_can_take_part_get_pieces_of_one_pass():
    given_out = share_out([open_pass("p", [10] * 16, leader="merge-worker-3")], [worker(n) for n in range(4)])
    assert {each.worker: each.num_pieces for each in given_out} == {
        "merge-worker-0": 1,
        "merge-worker-1": 1,
        "merge-worker-2": 1,
        "merge-worker-3": 2,
    }


def test_what_is_handed_out_shrinks_and_ends_together():
    left, seen = [7] * 40, []
    while left:
        (each,) = share_out([open_pass("p", left, leader="merge-worker-0")], [worker(0)])
        seen.append(each.num_pieces)
        left = left[each.num_pieces :]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 20
    assert seen[-1] == 1


def test_a_leader_works_on_its_own_pass_and_help_goes_where_most_is_left():
    passes = [open_pass("big", [100] * 8, leader="merge-worker-0"), open_pass("small", [10], leader="merge-worker-1")]
    given_out = {each.worker: each.pass_id for each in share_out(passes, [worker(n) for n in range(3)])}
    assert given_out == {"merge-worker-0": "big", "merge-worker-1": "small", "merge-worker-2": "big"}


def test_passes_are_shared_when_jobs_are_not_enough():
    workers = [worker(n) for n in range(4)]
    few = schedule([job(1), job(2)], workers, {}, limits())
    assert [unit.shared for unit in few.units] == [True, True]
    enough = schedule([job(n) for n in range(4)], workers, {}, limits())
    assert [unit.shared for unit in enough.units] == [False] * 4
    careful = schedule([job(1, alone=True), job(2)], workers, {}, limits())
    assert {unit.job_ids[0]: unit.shared for unit in careful.units} == {"job-1": False, "job-2": True}


def test_priority_counts_inside_of_a_share():
    """A share with urgent jobs gets no more turns by them: its urgent ones go before its others."""
    jobs = [
        job(0, share="a", priority=0),
        job(1, share="b", priority=0),
        job(2, share="a", priority=9),
        job(3, share="b", priority=0),
        job(4, share="a", priority=5),
    ]
    assert [each.sequence for each in in_turn(jobs)] == [2, 1, 4, 3, 0]


def test_without_shares_the_order_is_priority_then_age():
    jobs = [job(number, priority=number % 3) for number in range(9)]
    assert [each.sequence for each in in_turn(jobs[::-1])] == [2, 5, 8, 1, 4, 7, 0, 3, 6]


def test_a_resident_base_goes_first_among_the_most_urgent_of_all_shares():
    jobs = [
        job(0, "x", share="a"),
        job(1, "y", 9, share="b"),
        job(2, "z", share="b"),
    ]
    holds = {"y": 1, "z": 2}
    for key, first in holds.items():
        worker_ = dataclasses.replace(worker(0), residents=frozenset({key}))
        [unit] = schedule(jobs, [worker_], {}, limits(per_pass=1)).units
        # What is not among the most urgent of its share is no reason to turn from the order.
        assert unit.job_ids == (f"job-{first if first == 1 else 0}",)
