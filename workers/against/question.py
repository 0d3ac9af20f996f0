"""What the gate is asked, and who is told how far it is."""

from dataclasses import dataclass
from typing import Literal, Protocol

from jobs.locations import Location
from workers.against.comparison import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be compared, and how."""

    checkpoint: Location
    """What an external tool made."""
    release: Location
    """Of ours, in 16 or 32 bits: what it was made of."""
    base: Location | None = None
    """What the release was merged into, where that is not at the place that its manifest names."""
    limits: Limits
    level: Literal["full", "arithmetic"] = "full"
    """Whether models run, too, or tensors are compared alone."""


class Watch(Protocol):
    """Who is told how far the gate is; raises to stop it."""

    def step(self, words: str) -> None:
        """Say what is being done."""
        ...

    def expect(self, num_bytes: int) -> None:
        """Say how many bytes of the release are to be looked at."""
        ...

    def advance(self, num_bytes: int) -> None:
        """Say that so many more were."""
        ...
