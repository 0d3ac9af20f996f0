"""What a walk has in work: tiles, and what the tiles of one weight share."""

import math
import threading
from dataclasses import dataclass

import torch

from workers.bases.four_bit import QuantizedWeight
from workers.merging.output import OutputTensor
from workers.merging.tally import Tally


class WeightInWork:
    """What the tiles of one tensor share: loaded with the first, dropped with the last."""

    def __init__(
        self, tensor: OutputTensor, quantized: QuantizedWeight | None, num_columns: int, num_tiles: int
    ) -> None:
        self.tensor = tensor
        self.quantized = quantized
        self.num_columns = num_columns
        self.dtype = tensor.dtype if tensor.stored is None else tensor.stored.dtype
        """Of W as it is read."""
        if quantized is not None:
            self.dtype = quantized.dtype
        self.num_tiles_left = num_tiles
        self.lock = threading.Lock()
        self.operands: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """lora_A [R, I] and lora_B [O, R] of each job, float32, on the device."""
        self.tallies: dict[str, Tally] = {}
        """What the check of each job's tiles found."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of a weight."""

    weight: WeightInWork
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.weight.num_columns

    @property
    def num_elements(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its bytes in the dtype of the output."""
        return self.num_elements * self.weight.tensor.dtype.itemsize
