"""4-bit codes, two a byte, with a scale for each group of a row: NVFP4, MXFP4, and integers in 4 bits.

W = value x scale in float32, rounded once: what the libraries compute whose forms these are, as long as they round to
the same dtype.

Shape suffixes: O output features, I input features, G groups along I.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch

from workers.bases.forms import tile_memory
from workers.numerics.kernels.elements import ARRAY_DTYPES, array
from workers.numerics.kernels.four_bit import dequantize_groups

_STEP_ELEMENTS = 1 << 20
"""Weights that are dequantized at once."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the codes of E2M1 stand for."""
INT4 = tuple(float(code - 8) for code in range(16))
"""What codes of integers stand for that were made positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedWeight:
    """A linear weight in 4 bits."""

    codes: torch.Tensor
    """uint8 [O, I / 2], the first of two codes in the lower half."""
    scales: torch.Tensor
    """[O, G], as they are stored."""
    second: torch.Tensor | None = None
    """What all scales are multiplied or divided by, where there is such a one."""
    scaling: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    """Makes float32 of stored scales, and of the second one."""
    values: tuple[float, ...]
    """What each of the 16 codes stands for."""
    dtype: torch.dtype
    device: torch.device | None = None
    """Where tiles are brought to be dequantized; None for where the codes are."""

    row_alignment = 1

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.codes.numel() + self.scales.numel() * self.scales.dtype.itemsize + 4 * (self.second is not None)

    def dequantize_rows(self, start: int, stop: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize rows [start, stop); see `StoredWeight`."""
        num_columns = self.shape[1]
        group_size = num_columns // self.scales.shape[1]
        device = self.codes.device if self.device is None else self.device
        weight_OI = tile_memory(memory, (stop - start, num_columns), self.dtype, device)
        step = max(1, _STEP_ELEMENTS // num_columns)
        for begin in range(start, stop, step):  # no temporary grows with the tile
            rows = slice(begin, min(begin + step, stop))
            codes = self.codes[rows].to(device)
            scales = self.scaling(self.scales[rows].to(device), None if self.second is None else self.second.to(device))
            assert scales.dtype == torch.float32
            target = weight_OI[rows.start - start : rows.stop - start]
            if device.type == "cpu" and self.dtype in ARRAY_DTYPES:
                dequantize_groups(array(codes), array(scales.contiguous()), self.values, group_size, array(target))
            else:
                values = torch.tensor(self.values, device=device)
                pairs = torch.stack((values[(codes & 15).long()], values[(codes >> 4).long()]), dim=-1)
                groups = pairs.view(*scales.shape, group_size) * scales[..., None]
                target.copy_(groups.view(target.shape))
        return weight_OI

    def to(self, device: torch.device) -> Self:
        """Return this weight with its codes and scales on another device."""
        second = None if self.second is None else self.second.to(device)
        return dataclasses.replace(self, codes=self.codes.to(device), scales=self.scales.to(device), second=second)

    def brought_to(self, device: torch.device) -> Self:
        """Return this weight with tiles of it brought to a device to be dequantized; codes and scales stay."""
        return dataclasses.replace(self, device=device)
