"""What tiles are made of, read once: rows of the base, or dequantized ones, and the matrices of adapters.

Shape suffixes: O output features, I input features, R rank.
"""

import os
import threading
from pathlib import Path

import torch

from workers.adapters.plain_lora import read_operand
from workers.files.foreign import open_foreign
from workers.files.tensor_io import read_into
from workers.merging.base_plan import BasePlan
from workers.merging.job import Job
from workers.merging.passes import PassState
from workers.merging.work import Tile


class TileReader:
    """Reads tiles of W, and keeps the files of base and adapters open meanwhile; threads share it."""

    def __init__(self, base: BasePlan, state: PassState) -> None:
        self._directory = base.source.directory
        self._state = state
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        """Return the descriptor of a file, opened with its first use."""
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = open_foreign(path, any_size=True).descriptor
            return self._descriptors[path]

    def of_tile(self, tile: Tile) -> int | None:
        """Return the descriptor of the file that a tile is stored in; None where it is dequantized."""
        tensor = tile.weight.tensor
        return None if tensor.stored is None else self.descriptor(self._directory / tensor.shard)

    def read(self, tile: Tile, target_OI: torch.Tensor) -> None:
        """Read a tile of W into main memory, or dequantize it there.

        Args:
            tile: to be read.
            target_OI: on the CPU, of its shape, in the dtype of W.
        """
        tensor, quantized = tile.weight.tensor, tile.weight.quantized
        if quantized is not None:
            weight_OI = quantized.dequantize_rows(tile.rows.start, tile.rows.stop, target_OI)
            if weight_OI.data_ptr() != target_OI.data_ptr():
                target_OI.copy_(weight_OI)
            return
        assert tensor.stored is not None
        path = self._directory / tensor.shard
        begin = tensor.stored.begin + tile.rows.start * tile.weight.num_columns * tensor.stored.dtype.itemsize
        read_into(self.descriptor(path), path, target_OI, begin)
        self._state.count(base=tile.num_elements * tensor.stored.dtype.itemsize)

    def operands(self, tile: Tile, job: Job, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return lora_A [R, I] and lora_B [O, R] of a job for a weight, float32, on the device; they are read once."""
        plan, weight = job.in_work, tile.weight
        delta = plan.deltas[weight.tensor.name]
        with weight.lock:
            if job.id not in weight.operands:
                file = self.descriptor(plan.opened.weights_path)
                a_RI = read_operand(plan.opened, delta.a_RI, file).to(device)
                b_OR = read_operand(plan.opened, delta.b_OR, file).to(device)
                weight.operands[job.id] = a_RI, b_OR
                self._state.count(adapter=delta.a_RI.num_bytes + delta.b_OR.num_bytes)
            return weight.operands[job.id]

    def close(self) -> None:
        """Close all files; call once all threads have ended."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
