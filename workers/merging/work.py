"""What a walk has in work: tiles, in the order they are taken, and what the tiles of one weight share."""

import itertools
import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from workers.bases.forms import StoredWeight
from workers.merging.checks.tally import Tally
from workers.merging.form_tiles import FormedWeight
from workers.merging.output import OutputTensor

_MAX_OPEN_SHARDS = 256
"""Shards of all jobs that are written at one time; each holds two descriptors, and 1024 is a common limit."""


class WeightInWork:
    """What the tiles of one tensor share: loaded with the first, dropped with the last."""

    def __init__(self, tensor: OutputTensor, quantized: StoredWeight | None, num_columns: int, num_tiles: int) -> None:
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
        self.formed: dict[str, FormedWeight] = {}
        """What it becomes in each job that stores it in a form at once."""


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


def tiles_of_shards(
    tensors: Sequence[OutputTensor],
    take_up: Callable[[OutputTensor], tuple[WeightInWork, tuple[slice, ...]]],
    *,
    num_abreast: int,
    num_jobs: int,
) -> Iterator[Tile]:
    """Yield all tiles: of a few shards in turns, as the kernel lets one thread at a time write to a file.

    Args:
        tensors: in the order of the base.
        take_up: returns a tensor as it is in work, and the rows of its tiles.
        num_abreast: threads that compute.
        num_jobs: that each shard is written for.
    """
    by_shard: dict[str, list[OutputTensor]] = defaultdict(list)
    for tensor in tensors:
        by_shard[tensor.shard].append(tensor)

    def tiles_of(shard: Sequence[OutputTensor]) -> Iterator[Tile]:
        for tensor in shard:
            weight, rows = take_up(tensor)
            yield from (Tile(weight, each) for each in rows)

    # So many that no last one is left over: the digest of a file takes its bytes one after the other.
    num_abreast = math.ceil(len(by_shard) / max(1, len(by_shard) // num_abreast))
    num_abreast = max(1, min(num_abreast, _MAX_OPEN_SHARDS // max(1, num_jobs)))
    waiting = iter(by_shard.values())
    in_turn = deque(tiles_of(shard) for shard in itertools.islice(waiting, num_abreast))
    while in_turn:
        tiles = in_turn.popleft()
        while (tile := next(tiles, None)) is None and (shard := next(waiting, None)) is not None:
            tiles = tiles_of(shard)
        if tile is not None:
            in_turn.append(tiles)
            yield tile
