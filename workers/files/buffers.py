"""Memory on its way to files: filled by the threads that compute, written and hashed by others, and used again.

A buffer lies in memory as its bytes lie in the file, at the same distance from a page boundary, so that the whole pages
among them can be written past the page cache.
"""

import functools
import mmap
import threading
from collections import deque
from typing import Self

import torch

from workers.files.tensor_io import tensor_bytes
from workers.numerics.tiles import TILE_ELEMENTS

PAGE_BYTES = mmap.PAGESIZE
_ELEMENT_BYTES = 8
"""No dtype has larger elements."""
_KEPT_BYTES = 4 * TILE_ELEMENTS["cpu"] + 2 * PAGE_BYTES
"""What tiles take, in float32; more is for weights that have to be taken whole."""


class Buffer:
    """Memory for one range of bytes of a file. It goes back to its pool when all holders have let go.

    Its taker uses it as a context, and holds it until the end of that.
    """

    def __init__(self, pool: "BufferPool") -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._num_holders = 0
        self._storage: torch.Tensor
        self._bytes: memoryview
        self.values: torch.Tensor
        """The bytes, uint8 [num_bytes], on the CPU."""
        self.data: memoryview
        """The same memory."""
        self._keep(torch.empty(0, dtype=torch.uint8))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold(self) -> None:
        """Keep the bytes as they are until one more `release`."""
        with self._lock:
            self._num_holders += 1

    def release(self) -> None:
        """Let go of the bytes, which may be overwritten at once."""
        with self._lock:
            self._num_holders -= 1
            is_free = self._num_holders == 0
        if is_free:
            self._pool.put_back(self)

    def place(self, num_bytes: int, offset: int, *, pin: bool) -> None:
        """Become the memory for a range of a file, held once.

        Args:
            num_bytes: of the range.
            offset: of the range in its file.
            pin: whether memory that has to be taken is pinned.
        """
        # Elements begin at a multiple of their size, in the file, too, unless tensors of different types are mixed.
        begin = offset % PAGE_BYTES if offset % _ELEMENT_BYTES == 0 else 0
        if self._storage.numel() < num_bytes + 2 * PAGE_BYTES:
            self._keep(torch.empty(num_bytes + 2 * PAGE_BYTES, dtype=torch.uint8, pin_memory=pin))
        begin += -self._storage.data_ptr() % PAGE_BYTES
        self.values = self._storage[begin : begin + num_bytes]
        self.data = self._bytes[begin : begin + num_bytes]
        self._num_holders = 1

    def shrink(self) -> None:
        """Let go of memory that is more than tiles usually take."""
        if self._storage.numel() > _KEPT_BYTES:
            self._keep(torch.empty(0, dtype=torch.uint8))

    def view(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the bytes as the elements of a tensor."""
        return self.values.view(dtype).view(shape)

    def _keep(self, storage: torch.Tensor) -> None:
        self._storage = self.values = storage
        self._bytes = self.data = tensor_bytes(storage)


class BufferPool:
    """A fixed number of buffers. They grow to what is asked of them."""

    def __init__(self, num_buffers: int, *, pin: bool = False) -> None:
        """Make them, without memory yet.

        Args:
            num_buffers: how many ranges are on their way at the same time, at most.
            pin: whether a device copies into them.
        """
        self._num_buffers = num_buffers
        self._pin = pin
        self._free = deque(Buffer(self) for _ in range(num_buffers))
        self._changed = threading.Condition()

    @property
    def num_free(self) -> int:
        """Buffers that are free."""
        return len(self._free)

    @property
    def whole(self) -> bool:
        """Whether all buffers are free."""
        return len(self._free) == self._num_buffers

    def take(self, num_bytes: int, offset: int) -> Buffer:
        """Wait for a free buffer and hold it.

        Args:
            num_bytes: how many bytes it is for.
            offset: where in their file they will be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            buffer = self._free.pop()  # the one that is most likely in the caches
        try:
            buffer.place(num_bytes, offset, pin=self._pin)
        except BaseException:
            self.put_back(buffer)
            raise
        return buffer

    def put_back(self, buffer: Buffer) -> None:
        """Take a buffer back that is not held any more."""
        if not self._pin:
            buffer.shrink()
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()


def kept_pool(num_buffers: int, *, pin: bool) -> BufferPool:
    """Return a pool that stays, so that the next pass finds its memory: new pages cost as much as what is done in them.

    A pass that was torn off may have left buffers held. Then, and while another pass is at work, it is a new one.

    Args:
        num_buffers: as in `BufferPool`.
        pin: as in `BufferPool`.
    """
    if not _pool(num_buffers, pin).whole:
        _pool.cache_clear()
    return _pool(num_buffers, pin)


@functools.cache
def _pool(num_buffers: int, pin: bool) -> BufferPool:
    return BufferPool(num_buffers, pin=pin)
