"""The delta of one weight as the check has it: what proves a product of its two matrices, and their exact sums.

Shape suffixes: O output features, I input features, R rank, C chunks of the columns.
"""

import functools
import math

import numpy as np
import torch

from workers.numerics.kernels import merging
from workers.numerics.kernels.elements import array
from workers.numerics.products import Comparison

_EPSILON = torch.finfo(torch.float32).eps
_SMALLEST = 2.0**-149
"""The smallest float32 above zero."""
_SHORTEST = 1e-30
"""Columns of A are brought to one length, but those that are shorter than this: the factor is to be a float32."""
SPARSE = 16
"""Where fewer than one of so many are in doubt, the sums of these alone are computed."""


class Operands:
    """The delta of one weight, scaling * lora_B [O, R] @ lora_A [R, I], and what proves a product of the two.

    For the proof the columns of A are brought to one length and cut into chunks.
    """

    def __init__(self, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float, precision: torch.dtype) -> None:
        """Prepare the proof.

        Args:
            a_RI: lora_A, float32, finite.
            b_OR: lora_B, float32, finite.
            scaling: of their product.
            precision: float32, or float64 for outputs in float32.
        """
        self.b_OR = b_OR
        self.scaling = scaling
        self._precision = precision
        self._wide_a_RI = a_RI.double()
        self.a_RI = a_RI.to(precision) if precision is torch.float32 else self._wide_a_RI
        self._lengths_I = self._wide_a_RI.square().sum(0).sqrt_()
        factors_I = (_factors(a_RI.shape[1]) / self._lengths_I.clamp(min=_SHORTEST)).to(precision)
        self._factors_I = factors_I.numpy()
        rank, num_columns = a_RI.shape
        num_chunks = math.ceil(num_columns / merging.CHUNK)
        weighted_RI = torch.zeros(rank, num_chunks * merging.CHUNK, dtype=torch.float64)
        torch.mul(self._wide_a_RI, factors_I.double(), out=weighted_RI[:, :num_columns])
        self._projected_RC = weighted_RI.view(rank, num_chunks, merging.CHUNK).sum(2).numpy()

    def comparison(self, weight_OI: torch.Tensor, *, scaling: float) -> Comparison:
        """Begin a comparison with rows of W plus a product times a scaling."""
        return Comparison.of(weight_OI, self._factors_I, scaling)

    def scaled_b(self, rows: slice) -> torch.Tensor:
        """Return rows of B with the scaling in them, which goes in in float64; the merge scales the product."""
        return (self.b_OR[rows].double() * self.scaling).to(self._precision)

    def proves(self, rows: slice, projections_OC: np.ndarray) -> bool:
        """Return whether rows of a float32 product are B @ A, as far as their sums say, with a factor for each column.

        The sums of a wrong product are right for next to no factors (Freivalds, Probabilistic Machines Can Use Less
        Running Time, 1977). Where a right product errs by more than is allowed for its roundings, the answer is no, and
        each element is looked at.

        Args:
            rows: of the weight.
            projections_OC: float32, sums over chunks of `merging.CHUNK` columns.
        """
        # In units of what an element may be, rounded, times the root of their number, right products err by 1 at the
        # median and by up to 5, for operands of any kind; most of it is that sums of float32 are added up.
        allowance = 8 * _EPSILON * math.sqrt(merging.CHUNK)
        return bool(merging.proves(array(self.b_OR[rows]), self._projected_RC, projections_OC, allowance))

    def exactly(self, rows: slice, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the delta at some elements in float64, and by how much a sum of R products in float32 may be off it.

        Such a sum errs by at most about R + 3 roundings of its terms (Higham, Accuracy and Stability of Numerical
        Algorithms, 3.1), here and in the merge; |b . a| is bounded by the lengths of both. What is below the smallest
        float32 is rounded to multiples of that.

        Args:
            rows: of the weight.
            places: of the elements, counted from the first of these rows.
        """
        rank, num_columns = self.a_RI.shape
        row, column = places // num_columns, places % num_columns
        b_OR = self.b_OR[rows].double()
        if SPARSE * len(places) > len(b_OR) * num_columns:
            delta = (b_OR @ self._wide_a_RI).view(-1)[places]
        else:
            delta = (b_OR[row] * self._wide_a_RI.T[column]).sum(1)
        lengths = torch.linalg.vector_norm(b_OR, dim=1)[row] * self._lengths_I[column]
        slack = lengths.mul_(2 * (rank + 3) * _EPSILON).mul_(abs(self.scaling))
        return delta.mul_(self.scaling), slack.add_((rank + 3) * _SMALLEST * max(1.0, abs(self.scaling)))


@functools.lru_cache(maxsize=64)
def _factors(num_columns: int) -> torch.Tensor:
    """Return factors that have nothing to do with any weight, the same in every process: 3/4 to 5/4, of both signs."""
    generator = torch.Generator().manual_seed(num_columns)
    size, sign = torch.rand(2, num_columns, generator=generator, dtype=torch.float64)
    return torch.copysign(size / 2 + 0.75, sign - 0.5)
