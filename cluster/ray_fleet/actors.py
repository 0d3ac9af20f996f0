"""Workers as Ray actors: each in a process of its own, on any node of the cluster.

`MergeWorker` is a plain class and is wrapped here. Actors are never restarted by Ray, nor are calls repeated by it: a
death is an event the driver decides on. They are not detached: they end with the driver, however it ends.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cluster.fleet.actors import BESIDE_WORK, POLLS, ActorGoneError, Answer, CallRaisedError
from cluster.fleet.crews import Crew
from cluster.ray_fleet.losses import SessionLostError
from cluster.ray_fleet.placement import choose_node, near

_CONTROL = "control"
"""Concurrency group that answers while a unit runs."""

_EXIT = re.compile(r"Worker exit type: (\w+) Worker exit detail: (.*?)\s*(?:Some common|There are some|$)", re.DOTALL)

_LOOK_SECONDS = 5.0
"""How often it is looked whether the cluster has machines."""


class RayActor:
    """A Ray actor, by its handle."""

    def __init__(self, ray: Any, handle: Any, node: str | None) -> None:
        self._ray = ray
        self._handle = handle
        self.node = node

    @property
    def killed(self) -> bool:
        """Whether it was ended."""
        return self._handle is None

    def call(self, method: str, *arguments: Any, task_name: str) -> Answer:
        """Have a method called; the dashboard shows the call under `task_name`."""
        options: dict[str, Any] = {"name": task_name}
        if method in BESIDE_WORK:
            options["concurrency_group"] = _CONTROL
        if method in POLLS:  # on the dashboard they would bury the tasks that a person looks for
            options["enable_task_events"] = False
        answer: Answer = getattr(self._handle, method).options(**options).remote(*arguments)
        return answer

    def kill(self) -> None:
        """End its process, and let go of it: Ray frees its name when no process holds its handle."""
        self._ray.kill(self._handle)
        self._handle = None


class RayActors:
    """The actors of one driver, in the session that is open."""

    def __init__(self, worker_class: type, arguments: Callable[[Crew], tuple[Any, ...]]) -> None:
        """Take the class of the workers.

        Args:
            worker_class: `MergeWorker`, or a class with its methods.
            arguments: for the `__init__` of the workers of a crew.
        """
        import ray  # noqa: PLC0415 - reads the environment: see `session.py`

        self._ray: Any = ray
        options: dict[str, Any] = {
            "num_cpus": 0,  # else num_gpus=1 also takes a CPU, and a replacement could wait for it forever
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {_CONTROL: 2},
        }
        self._actor_class = self._ray.remote(**options)(worker_class)
        self._arguments = arguments
        self._actors: list[RayActor] = []
        self._looked_at = time.monotonic()

    def start(self, name: str, crew: Crew, avoid: frozenset[str]) -> RayActor | None:
        """Start an actor under a name; None while no node may take it, or Ray still knows one of that name."""
        self._actors = [actor for actor in self._actors if not actor.killed]
        node = None
        if crew.num_gpus_each == 0:
            counts = Counter(actor.node for actor in self._actors)
            node = choose_node(self._ray.nodes(), counts, avoid, without_gpus=crew.without_gpus)
            if node is None and crew.without_gpus:
                return None  # the machines it belongs on are gone, for now
        options = {
            "name": name,
            "num_gpus": crew.num_gpus_each,
            "scheduling_strategy": near(node),
            # With num_cpus=0 Ray would force one OpenMP thread, which bitsandbytes computes with.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(crew.num_threads)}},
        }
        try:
            handle = self._actor_class.options(**options).remote(*self._arguments(crew))
        except self._ray.exceptions.ActorAlreadyExistsError:
            return None  # the name is free once Ray has noticed that no process holds the dead actor's handle
        self._actors.append(RayActor(self._ray, handle, node))
        return self._actors[-1]

    def wait(self, answers: Sequence[Answer], timeout_seconds: float, *, for_all: bool = False) -> list[Answer]:
        """Wait until one of some answers is there, or all are, and return those that are there.

        Raises:
            SessionLostError: the cluster has no machine any more.
        """
        self._look_for_nodes()
        references = list(answers)
        if not references:
            time.sleep(timeout_seconds)
            return []
        self._ray.wait(references, num_returns=len(references) if for_all else 1, timeout=timeout_seconds)
        finished, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return list(finished)

    def _look_for_nodes(self) -> None:
        """Look now and then whether a raylet is left. Ray ends a driver without a control service, and not without one.

        Raises:
            SessionLostError: there is none; actors that are started would wait for one for ever.
        """
        if time.monotonic() - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        if not any(node["Alive"] for node in self._ray.nodes()):
            raise SessionLostError("no node of the Ray cluster is alive: its raylets have ended")

    def take(self, answer: Answer) -> Any:
        """Return an answer that is there."""
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            # What the worker raised, without Ray's account of where.
            raise CallRaisedError from getattr(error, "cause", error)
        except self._ray.exceptions.RayError as error:
            # With any other error of Ray's no answer will come. Its memory monitor, a dead machine or raylet and a lost
            # object have errors of their own, which do not derive from those of actors.
            raise ActorGoneError(
                death_of(str(error)), isinstance(error, self._ray.exceptions.OutOfMemoryError)
            ) from error


def death_of(text: str) -> str:
    """Return what counts in what Ray says of an actor that died: its process, and how that ended.

    Args:
        text: of Ray; returned as it is where it says nothing of the kind.
    """
    process, how = re.search(r"\bpid: (\d+)", text), _EXIT.search(text)
    if process is None or how is None:
        return text
    return (
        f"its process {process[1]} died ({how[1]}): {how[2]} Its log has what it said, dmesg of its machine whether "
        "the kernel killed it"
    )
