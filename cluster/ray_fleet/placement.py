"""On which machine a worker is put, where Ray does not decide."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any


def choose_node(
    nodes: Sequence[Mapping[str, Any]],
    num_workers: Mapping[str | None, int],
    avoid: AbstractSet[str],
    *,
    without_gpus: bool,
) -> str | None:
    """Return the node with the fewest workers for each of its cores, for a worker that asks for no GPU.

    Ray itself puts actors that ask for no resource wherever it likes, and leaves machines empty.

    Args:
        nodes: as `ray.nodes()` lists them.
        num_workers: on each node.
        avoid: nodes that come last.
        without_gpus: whether only nodes without a GPU will do.

    Returns:
        Its id; None when there is none.
    """
    cores = {
        node["NodeID"]: node["Resources"].get("CPU", 0.0)
        for node in nodes
        if node["Alive"] and not (without_gpus and node["Resources"].get("GPU", 0.0))
    }
    able = sorted(node for node, count in cores.items() if count > 0)
    return min(able, key=lambda node: (node in avoid, (num_workers[node] + 1) / cores[node]), default=None)


def near(node: str | None) -> Any:
    """Return how Ray is told to put an actor on a node; None where it may take any."""
    import ray.util.scheduling_strategies  # noqa: PLC0415 - reads the environment: see `session.py`

    if node is None:
        return "SPREAD"
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
