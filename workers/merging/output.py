"""Tensors of the output: what they are called, where they are and what they come from."""

import math
from dataclasses import dataclass

import torch

from workers.files.layout import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """One tensor of the merged checkpoints of a pass, before any delta."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: str
    """The base's file it is stored in."""
    stored: TensorSpec | None
    """The bytes it comes from; None when it is dequantized."""

    @property
    def num_bytes(self) -> int:
        """Number of bytes in the output."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        """Rows of the tensor as a matrix: its first dimension; a scalar has one."""
        return self.shape[0] if self.shape else 1

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_columns(self) -> int:
        """Columns of the tensor as a matrix: all further dimensions together."""
        return max(1, math.prod(self.shape[1:]))

    @property
    def copied(self) -> bool:
        """Whether, without a delta, the stored bytes are the output's bytes."""
        return self.stored is not None and self.stored.dtype == self.dtype
