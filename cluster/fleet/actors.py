"""What a pool asks of the place its workers run in: to start them, to call them, to wait for answers, to end them.

An actor is a worker that was started. It runs its methods one after the other, but those of `BESIDE_WORK`.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from cluster.fleet.crews import Crew

BESIDE_WORK = frozenset({"progress", "cancel"})
"""Methods that are answered while another one runs."""
POLLS = frozenset({"progress", "residents"})
"""Methods that are asked again and again."""

Answer = Hashable
"""Stands for what a call will return."""


class ActorGoneError(Exception):
    """The actor that was called is no more, or never came up; the text says why.

    Args:
        reason: the text.
        out_of_memory: whether it was ended because memory ran out.
    """

    def __init__(self, reason: str, out_of_memory: bool = False) -> None:
        super().__init__(reason, out_of_memory)
        self.out_of_memory = out_of_memory

    def __str__(self) -> str:
        return str(self.args[0])


class CallRaisedError(Exception):
    """The worker raised `__cause__` instead of returning."""


class Actor(Protocol):
    """One worker that was started; it may have died since."""

    @property
    def node(self) -> str | None:
        """The machine it was put on; None where the place chooses by itself."""

    def call(self, method: str, *arguments: Any, task_name: str) -> Answer:
        """Have a method called; returns at once.

        Args:
            method: of `MergeWorker`.
            arguments: its arguments.
            task_name: what people see it under.
        """

    def kill(self) -> None:
        """End it, whatever it is at. Its answers may never come."""


class Actors(Protocol):
    """Where workers run. One thread calls it."""

    def start(self, name: str, crew: Crew, avoid: frozenset[str]) -> Actor | None:
        """Start a worker; returns at once, and the answer to `ready` says when it is up.

        Args:
            name: of the worker; a former one of that name may just have died.
            crew: what it gets of the cluster.
            avoid: nodes to take only if there is no other.

        Returns:
            The actor; None when there is no place for it now.
        """

    def wait(self, answers: Sequence[Answer], timeout_seconds: float, *, for_all: bool = False) -> list[Answer]:
        """Wait until one of some answers is there, or all are, at most so long, and return those that are there.

        Args:
            answers: of different calls; none at all lets the time pass.
            timeout_seconds: how long at most.
            for_all: whether one is not enough.
        """

    def take(self, answer: Answer) -> Any:
        """Return an answer that is there.

        Raises:
            ActorGoneError: its actor died before it answered.
            CallRaisedError: the worker raised.
        """
