"""Tiles: how a weight is cut into rows that many threads work on at once, and the memory they work in."""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Self, TypeVar

import torch

_Result = TypeVar("_Result")

TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": (1 << 24) - (1 << 13)}
"""Elements of a tile, by the device that computes: so many that handing tiles from thread to thread costs little beside
what is done with them. For a GPU, a little less than a power of two, since torch pins no other sizes, and a buffer is
two pages longer than its tile."""

ALIGNED_ROWS = 128
"""Tiles begin at multiples of this where the rows of a matrix are one: no block of shared scales is cut."""


_STRIP_ELEMENTS = 1 << 19
"""Elements of a tile whose delta is computed at once on the CPU: it stays in the caches until it is added."""


@contextlib.contextmanager
def single_threads(num_threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Hand out a pool whose threads each run torch on themselves alone: threads with tiles of their own never wait.

    Each thread is told so, since MKL begins on all cores in a new one, and then adds up the products of a matrix of few
    rows in another order: the last bits of the first tile would depend on the number of cores.
    """
    num_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            num_threads, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_before)


def results_of(futures: Sequence[Future[_Result]]) -> list[_Result]:
    """Wait for all of some calls and return what they returned, or raise the first error: then none begins any more."""
    wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        future.cancel()
    failed = [future for future in futures if future.done() and not future.cancelled() and future.exception()]
    return [future.result() for future in failed or futures]


def rows_per_tile(num_rows: int, num_columns: int, alignment: int, tile_elements: int) -> int:
    """Return the rows of a tile: about `tile_elements` elements, a multiple of `alignment`, all tiles about even.

    Even, because a last tile of one row would go through another kernel, with other last bits.
    """
    most = max(1, tile_elements // (num_columns * alignment)) * alignment
    num_tiles = max(1, math.ceil(num_rows / most))
    return math.ceil(math.ceil(num_rows / num_tiles) / alignment) * alignment


def strips_of(num_rows: int, num_columns: int, num_elements: int = _STRIP_ELEMENTS) -> Iterator[slice]:
    """Yield the rows of a tile in strips that are computed with one after the other.

    Args:
        num_rows: of the tile.
        num_columns: of the tile.
        num_elements: about how many a strip has; by default as many as deltas are computed of at once.
    """
    step = rows_per_tile(num_rows, num_columns, 1, num_elements)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def columns_of(shape: tuple[int, ...]) -> int:
    """Return the columns of a tensor as a matrix.

    One of more than two dimensions is a column of its elements: a row of stacked experts would be larger than any tile,
    and no delta is streamed to it.
    """
    return shape[1] if len(shape) == 2 else 1


def aligned_rows(shape: tuple[int, ...], alignment: int) -> int:
    """Return what tiles of a tensor begin at multiples of, where they have to begin at multiples of `alignment`."""
    return math.lcm(alignment, ALIGNED_ROWS if len(shape) == 2 and shape[0] % ALIGNED_ROWS == 0 else 1)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a tensor is cut: tiles of whole rows. It depends on the tensor alone, not on who else is in a pass."""

    num_columns: int
    """Of the tensor as a matrix."""
    rows: tuple[slice, ...]
    """Of each tile; an empty tensor has one without rows."""

    @classmethod
    def of(cls, shape: tuple[int, ...], alignment: int, tile_elements: int) -> Self:
        """Cut a tensor.

        Args:
            shape: of the tensor.
            alignment: tiles begin at a multiple of this many rows.
            tile_elements: about how many elements a tile has.
        """
        num_columns = columns_of(shape)
        num_rows = math.prod(shape) // num_columns if num_columns else 0
        if not num_rows:
            return cls(num_columns, (slice(0, 0),))
        step = rows_per_tile(num_rows, num_columns, alignment, tile_elements)
        return cls(num_columns, tuple(slice(at, min(at + step, num_rows)) for at in range(0, num_rows, step)))


class TileBuffers(threading.local):
    """Scratch of one thread, reused for every tile; pinned where a device copies from it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storage: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, int]], torch.Tensor] = {}

    def get(self, use: str, dtype: torch.dtype, shape: tuple[int, int], *, host: bool) -> torch.Tensor:
        """Return the buffer of one use, uninitialized.

        Args:
            use: names the buffer; the same use gets the same memory again.
            dtype: of its elements.
            shape: rows and columns of the tile.
            host: whether it lies in main memory rather than on the device.
        """
        view = self._views.get((use, dtype, shape))
        if view is not None:
            return view
        num_bytes = math.prod(shape) * dtype.itemsize
        if use not in self._storage or self._storage[use].numel() < num_bytes:
            pin = host and self._device.type == "cuda"
            device = torch.device("cpu") if host else self._device
            self._storage[use] = torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pin)
            # Views of what was there before would keep it.
            self._views = {key: view for key, view in self._views.items() if key[0] != use}
        view = self._storage[use][:num_bytes].view(dtype).view(shape)
        self._views[use, dtype, shape] = view
        return view
