"""Weights in a format of compressed-tensors, dequantized by its own compressor.

Shape suffixes: O output features, I input features.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationStrategy

from workers.bases.forms import StoredWeight, tile_memory
from workers.bases.forms.block_scaled import FP8, INT8, MADE_POSITIVE, BlockScaledWeight
from workers.bases.forms.compressed.group import GLOBAL_SCALE, PACKED, SCALE, SHAPE, WEIGHT, ZERO_POINT, Group
from workers.bases.forms.grouped import FP4, INT4, GroupedWeight

_STEP_ELEMENTS = 1 << 19
"""Weights that are dequantized at once."""
_PACKED_ROWS = 32
"""Zero points of so many rows fill whole words, however many bits they have."""


_BYTE = 8
_OF_EXPONENTS = decompress_mx_scale(torch.arange(256).to(torch.uint8)).float()
"""float32 [256]: the scale that each exponent stands for."""
_OF_8_BITS = {torch.float8_e4m3fn: FP8, torch.int8: INT8}


def restored(
    tensors: Mapping[str, torch.Tensor], group: Group, shape: tuple[int, int], dtype: torch.dtype
) -> StoredWeight:
    """Build a weight of what it is stored in: by loops of ours where those give the bits of its compressor.

    They do where the compressor rounds its product to the dtype that is wanted: it rounds to that of its scales, and
    those of 4-bit floats it makes bfloat16.

    Args:
        tensors: by what they are called in their module.
        group: of the weight.
        shape: [O, I].
        dtype: what it dequantizes to.
    """
    codes, scales = tensors[group.codes], tensors[SCALE]
    whole = ZERO_POINT not in tensors and dtype in (torch.float32, torch.float16, torch.bfloat16)
    if group.format in _OF_4_BIT_FLOATS and whole and dtype is torch.bfloat16:
        scaling, second = _OF_4_BIT_FLOATS[group.format], tensors.get(GLOBAL_SCALE)
        return GroupedWeight(codes=codes, scales=scales, second=second, scaling=scaling, values=FP4, dtype=dtype)
    if whole and scales.dtype in (dtype, torch.float32):
        by_rows = group.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
        if group.format is CompressionFormat.pack_quantized and group.arguments.num_bits == 4 and by_rows:
            words = codes.view(torch.uint8)
            if 2 * words.shape[1] == shape[1]:  # the last word of a row may be filled up
                return GroupedWeight(codes=words, scales=scales, scaling=_as_floats, values=INT4, dtype=dtype)
        sizes = {
            QuantizationStrategy.TENSOR: shape,
            QuantizationStrategy.CHANNEL: (1, shape[1]),
            QuantizationStrategy.GROUP: (1, group.group_size or shape[1]),
            QuantizationStrategy.BLOCK: group.block,
        }
        block = sizes.get(group.strategy)
        values = _OF_8_BITS.get(codes.dtype)
        if group.format is CompressionFormat.pack_quantized and group.arguments.num_bits == _BYTE:
            codes, values = codes.view(torch.uint8), MADE_POSITIVE
        if values is not None and block is not None and codes.shape == shape:
            grid = math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])
            scales = scales.float().reshape(grid)
            return BlockScaledWeight(codes=codes, scales=scales, block=block, values=values, dtype=dtype)
    return CompressedWeight(tensors=tensors, group=group, shape=shape, dtype=dtype)


def _as_floats(scales: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    return scales.float()


def _of_nvfp4(scales: torch.Tensor, divisor: torch.Tensor | None) -> torch.Tensor:
    assert divisor is not None
    # One without a dimension does not make the quotient float32, there as here.
    return (scales.bfloat16() / divisor).float()


def _of_mxfp4(exponents: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    scales: torch.Tensor = _OF_EXPONENTS.to(exponents.device)[exponents.int()]
    return scales


_OF_4_BIT_FLOATS: Mapping[CompressionFormat, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    CompressionFormat.nvfp4_pack_quantized: _of_nvfp4,
    CompressionFormat.mxfp4_pack_quantized: _of_mxfp4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedWeight:
    """A linear weight, with the parts that its compressor takes."""

    tensors: Mapping[str, torch.Tensor]
    """By what they are called in their module."""
    group: Group
    shape: tuple[int, int]
    """[O, I]."""
    dtype: torch.dtype
    device: torch.device | None = None
    """Where tiles are brought to be dequantized; None for where the codes are."""

    @property
    def row_alignment(self) -> int:
        """Rows of a block, or of whole words of zero points."""
        return _PACKED_ROWS if self.group.packs_zero_points else self.group.block[0]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in self.tensors.values())

    def dequantize_rows(self, start: int, stop: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize rows [start, stop); see `StoredWeight`."""
        device = self.tensors[SCALE].device if self.device is None else self.device
        weight_OI = tile_memory(memory, (stop - start, self.shape[1]), self.dtype, device)
        step = max(1, _STEP_ELEMENTS // (self.shape[1] * self.row_alignment)) * self.row_alignment
        for begin in range(start, stop, step):  # no temporary grows with the tile
            end = min(begin + step, stop)
            rows = {name: tensor.to(device) for name, tensor in self._rows(begin, end)}
            weight_OI[begin - start : end - start] = self.group.compressor.decompress(rows, self.group.scheme)[WEIGHT]
        return weight_OI

    def to(self, device: torch.device) -> Self:
        """Return this weight with its codes and scales on another device."""
        return dataclasses.replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def brought_to(self, device: torch.device) -> Self:
        """Return this weight with tiles of it brought to a device to be dequantized; codes and scales stay."""
        return dataclasses.replace(self, device=device)

    def _rows(self, start: int, stop: int) -> Iterator[tuple[str, torch.Tensor]]:
        num_bits, num_block_rows = self.group.arguments.num_bits, self.group.block[0]
        for name, tensor in self.tensors.items():
            if name in (WEIGHT, PACKED):
                yield name, tensor[start:stop]
            elif name == SHAPE:
                yield name, torch.tensor([stop - start, self.shape[1]])
            elif name == GLOBAL_SCALE or self.group.strategy is QuantizationStrategy.TENSOR:
                yield name, tensor
            elif name == ZERO_POINT and self.group.packs_zero_points:
                yield name, tensor[start * num_bits // 32 : math.ceil(stop * num_bits / 32)]
            else:
                yield name, tensor[start // num_block_rows : math.ceil(stop / num_block_rows)]
