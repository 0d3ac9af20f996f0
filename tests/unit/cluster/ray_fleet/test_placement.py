"""On which node a worker goes that asks for no GPU."""

from collections import Counter

import pytest

from cluster.ray_fleet.placement import choose_node


def node(name, *, cpus=4.0, gpus=0.0, alive=True):
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return {"NodeID": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "workers", "avoid", "without_gpus", "expected"),
    [
        ([node("a"), node("b")], {}, set(), False, "a"),
        ([node("a"), node("b")], {"a": 1}, set(), False, "b"),
        ([node("a", cpus=16.0), node("b")], {"a": 2, "b": 1}, set(), False, "a"),  # by cores
        ([node("a"), node("b")], {"b": 3}, {"a"}, False, "b"),  # one that rests comes last
        ([node("a")], {}, {"a"}, False, "a"),  # but is taken where there is no other
        ([node("a", gpus=1.0), node("b")], {"b": 3}, set(), True, "b"),
        ([node("a", gpus=1.0)], {}, set(), True, None),
        ([node("a", alive=False), node("b", cpus=0.0)], {}, set(), False, None),
    ],
)
def test_the_node_with_the_fewest_workers_for_its_cores(nodes, workers, avoid, without_gpus, expected):
    assert choose_node(nodes, Counter(workers), avoid, without_gpus=without_gpus) == expected
