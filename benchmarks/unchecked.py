"""Merges of ours with the arithmetic check taken out, to be held against those that check nothing."""

import contextlib
from collections.abc import Iterator

import torch

from workers.merging.checks.arithmetic import ArithmeticCheck, Expected
from workers.merging.checks.tally import Tally
from workers.merging.output import OutputTensor
from workers.unit import unit


class _NoCheck(ArithmeticCheck):
    """Finds nothing, and reads nothing."""

    def weight(self, *_: OutputTensor | slice) -> torch.Tensor:
        return torch.empty(0)

    def expect(self, tally: Tally, rows: slice, weight_OI: torch.Tensor, **_: bool) -> Expected:
        return Expected(tally, rows, weight_OI, None)

    def judge(self, *_: Expected | torch.Tensor | tuple[str, int]) -> None:
        pass


@contextlib.contextmanager
def check_left_out() -> Iterator[None]:
    """Have workers of this process leave out the arithmetic check while this lasts. No release is made that way."""
    unit.ArithmeticCheck = _NoCheck  # type: ignore[misc]
    try:
        yield
    finally:
        unit.ArithmeticCheck = ArithmeticCheck  # type: ignore[misc]
