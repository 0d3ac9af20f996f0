"""How many workers there are by default, and what is refused."""

import pytest

from cluster.fleet import plan_fleet
from jobs.errors import NoCapacityError


@pytest.mark.parametrize(
    ("cluster", "asked", "expected"),
    [
        ((2, 0), {}, (1, "cpu", 2)),
        ((1, 0), {}, (1, "cpu", 1)),
        ((16, 0), {}, (8, "cpu", 2)),
        ((16, 0), {"num_workers": 4}, (4, "cpu", 4)),
        ((2, 0), {"num_workers": 4}, (4, "cpu", 1)),
        ((32, 8), {}, (8, "cuda", 4)),
        ((32, 8), {"device": "cpu"}, (16, "cpu", 2)),
        ((32, 8), {"num_workers": 2, "num_threads": 3}, (2, "cuda", 3)),
    ],
)
def test_workers_by_default(cluster, asked, expected):
    options = {"device": "auto", "num_workers": None, "num_threads": None} | asked
    fleet = plan_fleet(num_cpus=cluster[0], num_gpus=cluster[1], **options)
    assert (fleet.num_workers, fleet.device, fleet.num_threads) == expected
    assert fleet.num_gpus_each == (1 if fleet.device == "cuda" else 0)


@pytest.mark.parametrize("num_workers", [None, 3])
def test_more_cuda_workers_than_gpus_are_refused(num_workers):
    with pytest.raises(NoCapacityError, match="expected a GPU for each"):
        plan_fleet(num_cpus=8, num_gpus=0, device="cuda", num_workers=num_workers, num_threads=None)
