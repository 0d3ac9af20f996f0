"""How many workers there are by default, of what kinds, and what is refused."""

import pytest

from cluster.fleet.crews import plan_crews
from jobs.errors import NoCapacityError


@pytest.mark.parametrize(
    ("cluster", "asked", "expected"),
    [
        ((2, 0, 2), {}, [(1, "cpu", 2)]),
        ((1, 0, 1), {}, [(1, "cpu", 1)]),
        ((16, 0, 16), {}, [(8, "cpu", 2)]),
        ((16, 0, 16), {"num_workers": 4}, [(4, "cpu", 4)]),
        ((2, 0, 2), {"num_workers": 4}, [(4, "cpu", 1)]),
        ((32, 8, 0), {}, [(8, "cuda", 4)]),
        ((32, 8, 0), {"device": "cpu"}, [(16, "cpu", 2)]),
        ((32, 8, 0), {"num_workers": 2, "num_threads": 3}, [(2, "cuda", 3)]),
        ((48, 8, 16), {}, [(8, "cuda", 4), (8, "cpu", 2)]),
        ((48, 8, 16), {"num_workers": 10}, [(8, "cuda", 4), (2, "cpu", 8)]),
        ((48, 8, 16), {"num_workers": 8}, [(8, "cuda", 4)]),
        ((48, 8, 16), {"num_workers": 3, "num_threads": 5}, [(3, "cuda", 5)]),
        ((48, 8, 16), {"device": "cuda"}, [(8, "cuda", 6)]),
        ((48, 8, 16), {"device": "cpu"}, [(24, "cpu", 2)]),
    ],
)
def test_workers_by_default(cluster, asked, expected):
    options = {"device": "auto", "num_workers": None, "num_threads": None} | asked
    num_cpus, num_gpus, without = cluster
    crews = plan_crews(num_cpus=num_cpus, num_gpus=num_gpus, num_cpus_without_gpus=without, **options)
    assert [(crew.num_workers, crew.device, crew.num_threads) for crew in crews] == expected
    assert [crew.num_gpus_each for crew in crews] == [1 if crew.device == "cuda" else 0 for crew in crews]
    assert [crew.without_gpus for crew in crews] == [False, True][: len(crews)]


@pytest.mark.parametrize(
    ("device", "num_gpus", "without", "num_workers", "message"),
    [
        ("cuda", 0, 8, None, r"no GPU in the cluster: .* set MERGEFLEET_DEVICE to auto or cpu"),
        ("cuda", 0, 8, 3, r"no GPU in the cluster: .* set MERGEFLEET_DEVICE to auto or cpu"),
        ("cuda", 2, 8, 3, r"expected a GPU for each of 3 workers, found 2 .*; ask for at most 2 workers"),
        ("auto", 2, 0, 3, r"expected a GPU for each of 3 workers, found 2 .*; ask for at most 2 workers"),
    ],
)
def test_more_workers_than_gpus_are_refused_where_nothing_else_may_take_them(
    device, num_gpus, without, num_workers, message
):
    with pytest.raises(NoCapacityError, match=message):
        plan_crews(
            num_cpus=8,
            num_gpus=num_gpus,
            num_cpus_without_gpus=without,
            device=device,
            num_workers=num_workers,
            num_threads=None,
        )
