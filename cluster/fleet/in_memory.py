"""Workers in the memory of this process: a fleet without Ray, for tests, simulations and a debugger.

They run in threads, so that nothing ends one that hangs: the interpreter waits for it, too. And a worker that is killed
takes the driver with it. That is why `mergefleet run` has its workers on Ray.
"""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

from cluster.fleet.actors import BESIDE_WORK, Actor, ActorGoneError, Answer, CallRaisedError
from cluster.fleet.crews import Crew


def wait_for(futures: Sequence[Future[Any]], timeout_seconds: float, *, for_all: bool) -> None:
    """Wait until one of some futures is done, or all are, at most so long; no futures at all let the time pass."""
    if not futures:
        time.sleep(timeout_seconds)
    until = concurrent.futures.ALL_COMPLETED if for_all else concurrent.futures.FIRST_COMPLETED
    concurrent.futures.wait(futures, timeout_seconds, return_when=until)


class InMemoryActors:
    """Actors whose answers are futures: a value, what the worker raised, or `ActorGoneError`."""

    def __init__(
        self,
        start: Callable[[str, Crew], Actor],
        wait: Callable[..., None] = wait_for,
    ) -> None:
        """Take what makes actors.

        Args:
            start: returns the actor of a name, in whose crew it is; `ThreadActor`, or what answers by a script.
            wait: as `wait_for`; where time is simulated, what lets it pass.
        """
        self._start = start
        self._wait = wait

    def start(self, name: str, crew: Crew, avoid: frozenset[str]) -> Actor | None:  # noqa: ARG002 - there is one node
        """Start a worker."""
        return self._start(name, crew)

    def wait(self, answers: Sequence[Answer], timeout_seconds: float, *, for_all: bool = False) -> list[Answer]:
        """Wait until one of some answers is there, or all are, and return those that are there."""
        futures = cast("Sequence[Future[Any]]", answers)
        self._wait(futures, timeout_seconds, for_all=for_all)
        return [future for future in futures if future.done()]

    def take(self, answer: Answer) -> Any:
        """Return an answer that is there."""
        error = cast("Future[Any]", answer).exception()
        if isinstance(error, ActorGoneError):
            raise error
        if error is not None:
            raise CallRaisedError from error
        return cast("Future[Any]", answer).result()


class ThreadActor:
    """A worker whose work is done in one thread, and whose questions are answered in another."""

    node = None

    def __init__(self, worker_class: Callable[..., Any], *arguments: Any) -> None:
        """Have a worker made, in its thread; one whose `__init__` raises never comes up.

        Args:
            worker_class: `MergeWorker`, or a class with its methods.
            arguments: for its `__init__`.
        """
        self._at_work = ThreadPoolExecutor(1)
        self._beside = ThreadPoolExecutor(1)
        self._worker = self._at_work.submit(worker_class, *arguments)

    def call(self, method: str, *arguments: Any, task_name: str) -> Future[Any]:  # noqa: ARG002 - there is no dashboard
        """Have a method called in the thread it belongs to."""
        executor = self._beside if method in BESIDE_WORK else self._at_work
        return executor.submit(self._run, method, arguments)

    def _run(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if (error := self._worker.exception()) is not None:
            raise ActorGoneError(str(error)) from error
        return getattr(self._worker.result(), method)(*arguments)

    def kill(self) -> None:
        """Take no more from it; its thread ends what it is at, and no answer is read."""
        for executor in (self._at_work, self._beside):
            executor.shutdown(wait=False, cancel_futures=True)
