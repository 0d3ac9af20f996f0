"""The pool's memory of nodes, and what it logs of places that are empty; what it does with workers is a contract."""

from concurrent.futures import Future

from cluster.fleet.crews import Crew
from cluster.fleet.in_memory import InMemoryActors
from cluster.fleet.pool import WorkerPool
from workers.merging.outcomes import Readiness


class Node:
    """An actor on a node, whose GPU works or does not."""

    def __init__(self, node, fault):
        self.node = node
        self._fault = fault

    def call(self, method, *_, task_name):
        assert method == task_name == "ready"
        future = Future()
        future.set_result(Readiness(host=self.node, fault=self._fault))
        return future

    def kill(self):
        pass


class NodeActors(InMemoryActors):
    """Takes the first node that is not to be avoided; the first one is broken."""

    def __init__(self):
        super().__init__(None, lambda *_, **__: None)
        self.avoided = []

    def start(self, _name, _crew, avoid):
        self.avoided.append(avoid)
        node = "good" if "broken" in avoid else "broken"
        return Node(node, "ECC error" if node == "broken" else None)


def test_a_node_where_a_worker_did_not_start_is_avoided_until_it_has_rested(caplog):
    now = [1e6]  # a machine that has been up for long
    actors = NodeActors()
    crew = Crew(num_workers=1, device="cpu", num_threads=1)
    pool = WorkerPool(actors, [crew], ping_seconds=1e9, clock=lambda: now[0])
    pool.poll(0.0)
    assert actors.avoided == [frozenset()]
    pool.poll(0.0)
    assert len(actors.avoided) == 1  # its place rests
    assert "does not start yet" not in caplog.text  # nothing was asked of the cluster
    now[0] += 0.9
    pool._members["merge-worker-0"].rests_until = now[0]  # as another place on that node has it
    pool.poll(0.0)
    assert actors.avoided[1] == {"broken"}
    assert [view.up for view in pool.views()] == [True]
