"""On which machine a worker is put, where Ray does not decide."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from cluster.ray_fleet.crews import Crew
from cluster.ray_fleet.members import Member


class Placement:
    """Chooses machines for workers that ask for no GPU."""

    def __init__(self, ray: Any, clock: Callable[[], float]) -> None:
        """Take the open session.

        Args:
            ray: the module, with `ray.util.scheduling_strategies` imported.
            clock: seconds that only go forward.
        """
        self._ray = ray
        self._clock = clock
        self._rests: dict[str, float] = {}
        """Until when nodes get no worker because one did not start there; only of those that are chosen here."""

    def choose(self, crew: Crew, members: Iterable[Member]) -> str | None:
        """Return the node with the fewest workers for each of its cores; None where GPUs decide.

        Ray itself puts actors that ask for no resource wherever it likes, and leaves machines empty. A node where a
        worker did not start comes last for a while.
        """
        if crew.num_gpus_each > 0:
            return None
        nodes: list[dict[str, Any]] = [
            node
            for node in self._ray.nodes()
            if node["Alive"] and not (crew.without_gpus and node["Resources"].get("GPU", 0.0))
        ]
        cores = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in nodes}
        counts = Counter(member.node for member in members if member.handle is not None)
        able = sorted(node for node, count in cores.items() if count > 0)
        rests = {node for node, until in self._rests.items() if self._clock() < until}
        return min(able, key=lambda node: (node in rests, (counts[node] + 1) / cores[node]), default=None)

    def near(self, node: str | None) -> Any:
        """Return how Ray is told to put an actor on a node; None where it may take any."""
        if node is None:
            return "SPREAD"
        return self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def leave_alone(self, node: str, until: float) -> None:
        """Have other nodes come before one until a time of the clock."""
        self._rests[node] = until
