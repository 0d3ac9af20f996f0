"""How a tile of a merged weight is made: W plus delta, on the CPU or on a device.

The order of operations is that of PEFT's `Linear.merge` with `safe_merge=False` (0.21): (B @ A) in float32, times the
scaling, plus W, one rounding.

Shape suffixes: O output features, I input features, R rank.
"""

from collections.abc import Sequence

import torch

from workers.merging.job import Job
from workers.merging.output import OutputTensor
from workers.merging.passes import check_range
from workers.merging.tile_reading import TileReader
from workers.merging.work import Tile
from workers.numerics import products
from workers.numerics.products import Comparison
from workers.numerics.tiles import TileBuffers, strips_of


class TileMaker:
    """Makes tiles for the jobs of a pass; threads share it."""

    def __init__(self, jobs: Sequence[Job], reader: TileReader, buffers: TileBuffers, device: torch.device) -> None:
        self._jobs = jobs
        self._reader = reader
        self._buffers = buffers
        self._device = device

    def read(self, tile: Tile, num_made: int) -> torch.Tensor | None:
        """Read a tile of W that several are made of, or that has to be brought to the device.

        Args:
            tile: to be read.
            num_made: how many are made of it.

        Returns:
            It, on the device if something is made of it; None where it goes straight into the memory of the one that
            it becomes.
        """
        is_same = self._device.type == "cpu" and tile.weight.dtype == tile.weight.tensor.dtype
        if num_made == 1 and (is_same or not self._computed(tile.weight.tensor)):
            return None
        return self._read(tile)

    def make(
        self,
        target_OI: torch.Tensor,
        tile: Tile,
        job: Job,
        made_from: torch.Tensor | None,
        comparison: Comparison | None,
    ) -> None:
        """Make a tile for a job.

        Args:
            target_OI: in main memory; becomes the tile, and holds W where that was read into it.
            tile: which one.
            job: says what is added.
            made_from: W, where it is elsewhere.
            comparison: to be done on the way.

        Raises:
            BadInputError: the dtype cannot hold it, or the adapter cannot be read any more.
        """
        tensor = tile.weight.tensor
        if tensor.name in job.in_work.deltas:
            add = self._add_on_cpu if self._device.type == "cpu" else self._add_on_device
            add(target_OI, tile, job, made_from, comparison)
            return
        if made_from is not None:
            # Written from memory even where the base could be copied: the tile is here, and the base is read once.
            target_OI.copy_(made_from)
        if self._computed(tensor):
            check_range(tensor, target_OI)

    def _computed(self, tensor: OutputTensor) -> bool:
        changed = any(tensor.name in job.in_work.deltas for job in self._jobs)
        return tensor.num_bytes > 0 and (changed or not tensor.copied)

    def _read(self, tile: Tile) -> torch.Tensor:
        quantized = tile.weight.quantized
        if quantized is not None and self._device.type != "cpu":
            return quantized.dequantize_rows(tile.rows.start, tile.rows.stop)
        weight_OI = self._buffers.get("weight", tile.weight.dtype, tile.shape, host=True)
        self._reader.read(tile, weight_OI)
        return weight_OI.to(self._device, non_blocking=True) if self._computed(tile.weight.tensor) else weight_OI

    def _add_on_cpu(
        self,
        target_OI: torch.Tensor,
        tile: Tile,
        job: Job,
        weight_OI: torch.Tensor | None,
        comparison: Comparison | None,
    ) -> None:
        """Add the delta to W, or to what is in its place if W is not given; do a comparison on the way."""
        tensor, scaling = tile.weight.tensor, job.in_work.deltas[tile.weight.tensor.name].scaling
        a_RI, b_OR = self._reader.operands(tile, job, self._device)
        b_OR = b_OR[tile.rows]
        made_from = target_OI if weight_OI is None else weight_OI
        if not products.merge(
            b_OR, a_RI, scaling, target_OI, self._buffers, weight_OI=made_from, comparison=comparison
        ):
            if weight_OI is None:
                weight_OI = self._read(tile)
            for rows in strips_of(*tile.shape):
                check_range(tensor, torch.mm(b_OR[rows], a_RI).mul_(scaling).add_(weight_OI[rows]))

    def _add_on_device(
        self, target_OI: torch.Tensor, tile: Tile, job: Job, weight_OI: torch.Tensor | None, _: Comparison | None
    ) -> None:
        """Add the delta to W, which is on the device."""
        assert weight_OI is not None
        tensor, scaling = tile.weight.tensor, job.in_work.deltas[tile.weight.tensor.name].scaling
        a_RI, b_OR = self._reader.operands(tile, job, self._device)
        sum_OI = self._buffers.get("sum", torch.float32, tile.shape, host=False)
        torch.mm(b_OR[tile.rows], a_RI, out=sum_OI)
        if scaling != 1.0:
            sum_OI.mul_(scaling)
        sum_OI.add_(weight_OI)
        rounded_OI = self._buffers.get("rounded", target_OI.dtype, tile.shape, host=False)
        rounded_OI.copy_(sum_OI)
        target_OI.copy_(rounded_OI, non_blocking=True)
        check_range(tensor, sum_OI)
        torch.cuda.current_stream(self._device).synchronize()
