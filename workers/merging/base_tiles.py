"""A base's weights tile by tile, as a merge takes them: as they are stored, cast, or dequantized."""

from collections.abc import Iterator

import torch

from workers.bases.forms import StoredWeight
from workers.bases.quantized_base import QuantizedBase
from workers.files.tensor_io import read_rows
from workers.merging.base_plan import BasePlan
from workers.merging.output import OutputTensor
from workers.numerics.tiles import TILE_ELEMENTS, Tiling, rows_per_tile


def tiles_of(base: BasePlan, quantized: QuantizedBase | None, tensor: OutputTensor) -> Iterator[torch.Tensor]:
    """Yield a tensor of the base in its order.

    Args:
        base: the planned base.
        quantized: its weights that are codes, where it has such.
        tensor: of the base.

    Raises:
        BadInputError, NotFoundError, TransientIOError: it cannot be read, by kind of fault.
    """
    if tensor.stored is None:
        assert quantized is not None
        yield from dequantized(quantized.weight(tensor.name), tensor.dtype)
        return
    path = base.source.directory / tensor.shard
    step = max(1, rows_per_tile(tensor.num_rows, tensor.num_columns, 1, TILE_ELEMENTS["cpu"]))
    for start in range(0, tensor.num_rows, step):
        yield read_rows(path, tensor.stored, start, min(start + step, tensor.num_rows)).to(tensor.dtype)


def dequantized(weight: StoredWeight, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield a weight that is codes, on the CPU in another dtype."""
    for rows in Tiling.of(weight.shape, weight.row_alignment, TILE_ELEMENTS["cpu"]).rows:
        yield weight.dequantize_rows(rows.start, rows.stop).cpu().to(dtype)
