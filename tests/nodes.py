"""Several Ray nodes on this machine, each with a GPU that is not there; run as a process of its own.

Usage: python -m tests.nodes HOME NUM_NODES [--by cpu] [--kill] [--mixed]

Drains the ledger of HOME with a worker on each node: Ray hands out the fake GPUs, one to a worker, and the workers
compute on the CPU. With `--by cpu` they ask for none, as workers of a fleet without GPUs. Prints the driver's events as
JSON lines, and for each worker the node it is on. With `--kill`, the first worker that works on pieces of a pass is
killed, in the middle of them. With `--mixed` the last node has no GPU, the fleet is the one that `mergefleet run` would
plan, and the workers of the other nodes find that their GPUs cannot be used.
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.console.documents import plain
from cluster.driving.driver import Driver
from cluster.driving.events import DriverEvent, ShardsStarted, WorkerBenched, event_name
from cluster.driving.replies import WorkerUnfit
from cluster.fleet.crews import Crew, plan_crews
from cluster.fleet.pool import WorkerPool
from cluster.ray_fleet.actors import RayActors
from cluster.ray_fleet.metrics import FleetMetrics
from cluster.ray_fleet.session import Session, close_session, open_session
from cluster.settings import Settings, load_settings, worker_settings
from jobs.ledger.store import JobStore
from workers.merging.settings import WorkerSettings


def main() -> None:
    """Start nodes, drain a ledger on them, and say what happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("num_nodes", type=int)
    parser.add_argument("--by", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--mixed", action="store_true")
    arguments = parser.parse_args()
    token = arguments.home / "token"
    token.write_text(secrets.token_hex(32))
    os.environ |= {
        "MERGEFLEET_HOME": str(arguments.home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only: see `cluster/ray_fleet/session.py`
    }
    with tempfile.TemporaryDirectory(prefix="mf-", ignore_cleanup_errors=True) as short:
        os.environ["RAY_TMPDIR"] = short
        Path(short, "ray").mkdir()
        drain_on_nodes(arguments.num_nodes, by=arguments.by, kill=arguments.kill, mixed=arguments.mixed)


def planned(session: Session, settings: Settings) -> tuple[Crew, ...]:
    """Return the workers that `mergefleet run` would have."""
    return plan_crews(
        num_cpus=session.num_cpus,
        num_gpus=session.num_gpus,
        num_cpus_without_gpus=session.num_cpus_without_gpus,
        device=settings.device,
        num_workers=settings.workers,
        num_threads=settings.num_threads,
    )


def drain_on_nodes(num_nodes: int, *, by: str, kill: bool, mixed: bool) -> None:
    """Drain the ledger on so many nodes.

    Args:
        num_nodes: each with one core and one fake GPU; the last of a mixed fleet has none.
        by: what workers are given out by.
        kill: whether the first worker at a piece is killed.
        mixed: whether workers with a GPU use it.
    """
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster()
    for number in range(num_nodes):
        has_gpu = not mixed or number < num_nodes - 1
        cluster.add_node(num_cpus=1, num_gpus=int(has_gpu), include_dashboard=False)
    settings = load_settings(poll_seconds=0.1, lease_seconds=60.0)
    session = open_session(settings, namespace="nodes", address=cluster.address, log_format="text")
    import ray

    from workers.worker import MergeWorker

    class LocatedWorker(MergeWorker):
        """Says which process it is, and on which node."""

        def where(self) -> tuple[int, str]:
            return os.getpid(), ray.get_runtime_context().get_node_id()

    places: dict[str, tuple[int, str]] = {}

    def listen(event: DriverEvent) -> None:
        print(json.dumps({"event": event_name(event), **plain(event)}), flush=True)
        if kill and isinstance(event, ShardsStarted) and not killed:
            killed.append(event.worker)
            time.sleep(0.5)  # it is in the middle of it
            os.kill(places[event.worker][0], signal.SIGKILL)

    killed: list[str] = []
    crews = planned(session, settings) if mixed else (Crew(num_workers=num_nodes, device=by, num_threads=1),)

    def arguments(crew: Crew) -> tuple[WorkerSettings]:
        return (worker_settings(settings, device=crew.device if mixed else "cpu", num_threads=1),)

    with (
        contextlib.closing(JobStore(settings.store)) as store,
        contextlib.closing(WorkerPool(RayActors(LocatedWorker, arguments), crews, ping_seconds=0.1)) as pool,
    ):
        while not all(view.idle or (mixed and view.device == "cuda") for view in pool.views()):
            for event in [event for event in pool.poll(0.1) if isinstance(event, WorkerUnfit)]:
                listen(WorkerBenched(worker=event.worker, reason=event.reason))
        for view in [view for view in pool.views() if view.up]:
            actor: Any = ray.get_actor(view.name)
            places[view.name] = ray.get(actor.where.remote())
            print(json.dumps({"event": "place", "worker": view.name, "node": places[view.name][1]}), flush=True)
        driver = Driver(store, pool, settings, FleetMetrics(), owner="nodes", listener=listen)
        print(json.dumps({"event": "summary", **plain(driver.run(drain=True))}), flush=True)
    close_session()
    cluster.shutdown()


if __name__ == "__main__":
    main()
