"""Merges of ours with the arithmetic check taken out, to be held against those that check nothing."""

import contextlib
from collections.abc import Iterator

import torch

from workers.merging.arithmetic import ArithmeticCheck
from workers.merging.output import OutputTensor
from workers.merging.tally import Tally
from workers.numerics.products import Comparison
from workers.unit import unit


class _NoCheck(ArithmeticCheck):
    """Finds nothing, and reads nothing."""

    def weight(self, *_: OutputTensor | slice) -> torch.Tensor:
        return torch.empty(0)

    def on_the_way(self, *_: Tally | torch.Tensor) -> None:
        return None

    def compare(
        self, tally: Tally, rows: slice, place: tuple[str, int], *_: torch.Tensor, found: Comparison | None = None
    ) -> None:
        pass


@contextlib.contextmanager
def check_left_out() -> Iterator[None]:
    """Have workers of this process leave out the arithmetic check while this lasts. No release is made that way."""
    unit.ArithmeticCheck = _NoCheck  # type: ignore[misc]
    try:
        yield
    finally:
        unit.ArithmeticCheck = ArithmeticCheck  # type: ignore[misc]
