"""What the arithmetic check finds about one tensor of one job, over its tiles."""

import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.parity_report import TensorCheck
from workers.files.layout import ShardLayout, TensorSpec
from workers.merging.checks.evidence import Evidence
from workers.merging.checks.proof import Operands
from workers.numerics.rounding import precision_for


@dataclass(slots=True)
class Sums:
    """What is gathered about one tensor of one job, over its tiles."""

    max_abs_error: float = 0.0
    rounding_excess: float = 0.0
    num_bad_elements: int = 0
    changed: bool = False
    """Whether some element is not W."""
    weight_square: float = 0.0
    delta_square: float = 0.0
    kept: float = 0.0
    """<merged - W, delta>."""

    def add(self, other: "Sums") -> None:
        """Take on what was gathered elsewhere."""
        self.max_abs_error = max(self.max_abs_error, other.max_abs_error)
        self.rounding_excess = max(self.rounding_excess, other.rounding_excess)
        self.num_bad_elements += other.num_bad_elements
        self.changed |= other.changed
        self.weight_square += other.weight_square
        self.delta_square += other.delta_square
        self.kept += other.kept


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChecks:
    """What was found about some tensors of one job."""

    tensors: Mapping[str, TensorCheck]
    """By name."""
    wrong: tuple[str, ...]
    """What is wrong besides, a sentence each."""


class Tally:
    """What is found about one tensor of one job, over its tiles; several threads add to it."""

    def __init__(self, place: tuple[ShardLayout, TensorSpec], name: str, evidence: Evidence) -> None:
        """Start with nothing found.

        Args:
            place: where the tensor goes.
            name: of the tensor.
            evidence: what the adapter says of it.
        """
        shard, spec = place
        self.name = name
        self.shard = shard.name
        self.spec = spec
        self._evidence = evidence
        self.targeted = name in evidence.pairs
        """Whether something is added to it."""
        self._sums: dict[int, Sums] = {}
        """By the row they begin at."""
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._operands: Operands | None = None

    @property
    def operands(self) -> Operands | None:
        """The delta of the tensor; None if it is to be what it was."""
        if self.targeted and self._operands is None:
            with self._reading:
                if self._operands is None and (factors := self._evidence.factors(self.name)) is not None:
                    self._operands = Operands(*factors, precision_for(self.spec.dtype))
        return self._operands

    @property
    def changed(self) -> bool:
        """Whether some element of the tiles compared so far is not W."""
        with self._lock:
            return any(sums.changed for sums in self._sums.values())

    def add(self, start: int, sums: Sums) -> None:
        """Add what was found about the rows from `start` on."""
        with self._lock:
            self._sums[start] = sums

    def summary(self) -> TensorCheck:
        """Return what was found, once all tiles are compared."""
        sums = Sums()
        for start in sorted(self._sums):  # added up in one order: reports have the same bytes
            sums.add(self._sums[start])
        return TensorCheck(
            tensor=self.name,
            changed=sums.changed,
            targeted=self.targeted,
            max_abs_error=sums.max_abs_error,
            rounding_excess=sums.rounding_excess,
            num_bad_elements=sums.num_bad_elements,
            weight_norm=math.sqrt(finite(sums.weight_square)),
            delta_norm=math.sqrt(finite(sums.delta_square)),
            survival=sums.kept / sums.delta_square if sums.delta_square > 0 and math.isfinite(sums.kept) else None,
        )


def finite(value: float) -> float:
    """Return a number that a JSON report can hold: NaN and infinity are as wrong as can be."""
    return value if math.isfinite(value) else sys.float_info.max
