"""8-bit codes with a scale for each block: FP8, and integers in 8 bits.

W = value x scale in float32, rounded once: what the libraries compute whose forms these are, as long as they round to
the same dtype.

Shape suffixes: O output features, I input features, B blocks.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

import torch

from workers.bases.forms import tile_memory
from workers.numerics.kernels.eight_bit import dequantize
from workers.numerics.kernels.elements import ARRAY_DTYPES, array

_STEP_ELEMENTS = 1 << 20
"""Weights that are dequantized at once, where that is torch's work."""

_EVERY = torch.arange(256).to(torch.uint8)
FP8 = _EVERY.view(torch.float8_e4m3fn).float()
"""What codes of E4M3 stand for."""
INT8 = _EVERY.view(torch.int8).float()
"""What integers stand for."""
MADE_POSITIVE = _EVERY.float() - 128
"""What integers stand for that were made positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScaledWeight:
    """A linear weight in 8 bits."""

    codes: torch.Tensor
    """[O, I], of any dtype of one byte."""
    scales: torch.Tensor
    """float32 [OB, IB]: what the codes of each block are multiplied by."""
    block: tuple[int, int]
    """Rows and columns of a block."""
    dtype: torch.dtype
    values: torch.Tensor = FP8
    """float32 [256]: what each code stands for, by its bits."""
    device: torch.device | None = None
    """Where tiles are brought to be dequantized; None for where the codes are."""

    row_alignment = 1

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        num_rows, num_columns = self.codes.shape
        return num_rows, num_columns

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.codes.numel() + self.scales.numel() * 4

    def dequantize_rows(self, start: int, stop: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize rows [start, stop); see `StoredWeight`."""
        num_rows, num_columns = self.block
        codes_OI = self.codes[start:stop].view(torch.uint8)
        scales_BB = self.scales[start // num_rows : math.ceil(stop / num_rows)]
        if self.device is not None:
            codes_OI, scales_BB = codes_OI.to(self.device), scales_BB.to(self.device)
        weight_OI = tile_memory(memory, (stop - start, codes_OI.shape[1]), self.dtype, codes_OI.device)
        if weight_OI.device.type == "cpu" and self.dtype in ARRAY_DTYPES:
            codes, scales = array(codes_OI), array(scales_BB.contiguous())
            layout = (codes_OI.shape[1], num_rows, num_columns, start % num_rows)
            dequantize(codes, scales, self.values.numpy(), layout, array(weight_OI))
            return weight_OI
        values = self.values.to(codes_OI.device)
        step = max(1, _STEP_ELEMENTS // codes_OI.shape[1])
        for begin in range(0, stop - start, step):  # no temporary grows with the tile
            rows = torch.arange(begin, min(begin + step, stop - start), device=codes_OI.device)
            scales_OB = scales_BB[(rows + start % num_rows) // num_rows]
            if scales_OB.shape[1] > 1:
                scales_OB = scales_OB.repeat_interleave(num_columns, 1)[:, : codes_OI.shape[1]]
            part = slice(begin, begin + len(rows))
            weight_OI[part] = values[codes_OI[part].int()].mul_(scales_OB)
        return weight_OI

    def to(self, device: torch.device) -> Self:
        """Return this weight with its codes and scales on another device."""
        return dataclasses.replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def brought_to(self, device: torch.device) -> Self:
        """Return this weight with tiles of it brought to a device to be dequantized; codes and scales stay."""
        return dataclasses.replace(self, device=device)
