"""Scales folded into weights: AWQ and SmoothQuant divide a norm, and multiply columns of the weights that read it.

Of a weight A of the release and what stands for it, B, the least squares of B = diag(r) A diag(c) + noise: each of c
and r by the sums of products along the other axis. Quantizing alone leaves both near 1.

Shape suffixes: O output features, I input features.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch

_FOLDED = 0.75
"""Where scales take away a quarter of the squared error, they are no noise: that lets one in O or I of it go."""
_DEVIATIONS = 4.0
"""By so many standard deviations of the noise a fit has to be better."""
_NOTICED = 0.005
"""Smaller spreads of scales are what 16 bits round to."""
_MATCHED = 0.3
"""Share of the spread of scales that what explains them may leave."""


@dataclass(frozen=True, slots=True)
class Marginals:
    """Sums of products along one axis, by row or by column; float64."""

    bb: torch.Tensor
    ab: torch.Tensor
    aa: torch.Tensor

    @classmethod
    def zeros(cls, size: int) -> Self:
        """Return sums of nothing."""
        return cls(*(torch.zeros(size, dtype=torch.float64) for _ in range(3)))

    @property
    def fitted(self) -> torch.Tensor:
        """The scale of each row or column; 1 where A is zero."""
        return torch.where(self.aa > 0, self.ab / self.aa.clamp(min=torch.finfo(torch.float64).tiny), 1.0)

    @property
    def residual(self) -> float:
        """Squared error that is left with these scales."""
        return float((self.bb - self.fitted.square() * self.aa).clamp(min=0).sum())


def is_scaled(columns: Marginals, rows: Marginals, squared_error: float) -> bool:
    """Return whether scales explain more of an error than noise would let them.

    Args:
        columns: sums over O.
        rows: sums over I.
        squared_error: of all elements.
    """
    return min(columns.residual, rows.residual) < _FOLDED * squared_error


def follows(columns: Marginals, ratio_I: torch.Tensor, num_rows: int) -> bool:
    """Return whether the columns of a weight are scaled as a changed norm says, rather than all alike.

    Args:
        columns: sums over O.
        ratio_I: what the norm was divided by.
        num_rows: O.
    """
    by_norm = ratio_I * float((ratio_I * columns.ab).sum() / (ratio_I.square() * columns.aa).sum())
    alike = float(columns.ab.sum() / columns.aa.sum())
    gain = float((columns.aa * ((columns.fitted - alike).square() - (columns.fitted - by_norm).square())).sum())
    noise = columns.residual / (num_rows * len(ratio_I))
    deviation = 2 * math.sqrt(noise * float((columns.aa * (by_norm - alike).square()).sum()))
    return math.isfinite(gain) and gain > 0 and gain > _DEVIATIONS * deviation


def spread(scales: torch.Tensor) -> float:
    """Return how far scales are from being one, median of |s / median - 1|."""
    middle = float(scales.median())
    if not middle:
        return math.inf if bool(scales.any()) else 0.0
    return float((scales / middle - 1).abs().median())


def is_spread(scales: torch.Tensor, error: float, num_summed: int) -> bool:
    """Return whether fitted scales differ among each other by more than noise.

    Args:
        scales: by row or column.
        error: relative, with the scales taken out.
        num_summed: elements that each was fitted to.
    """
    return spread(scales) > max(_NOTICED, 3 * error / math.sqrt(num_summed))


def matches(scales: torch.Tensor, explanation: torch.Tensor) -> bool:
    """Return whether scales are, but for one factor, those that explain them.

    Args:
        scales: by row or column, as they were fitted.
        explanation: what they should be.
    """
    if scales.shape != explanation.shape:
        return False
    return spread(scales / explanation) < _MATCHED * spread(scales)
