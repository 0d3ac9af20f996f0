"""Buffers: in memory where they are in the file, used again, and never lost."""

import threading

import pytest
import torch

from workers.files import buffers
from workers.files.buffers import PAGE_BYTES, BufferPool, kept_pool
from workers.numerics.tiles import TILE_ELEMENTS


@pytest.mark.parametrize("offset", [0, 8, 4095, 4096, 12_345 * 8])
def test_bytes_lie_in_memory_as_in_the_file(offset):
    with BufferPool(1).take(10_000, offset) as buffer:
        assert buffer.values.numel() == 10_000
        # Where elements would not begin at a multiple of their size, they come first.
        assert (buffer.values.data_ptr() - (offset if offset % 8 == 0 else 0)) % PAGE_BYTES == 0
        assert buffer.view(torch.float64, (10, 125)).shape == (10, 125)


def test_a_buffer_is_free_when_all_have_let_go():
    pool = BufferPool(1)
    with pool.take(10, 0) as buffer:
        buffer.hold()
        assert pool.num_free == 0
    assert pool.num_free == 0
    waiting = threading.Thread(target=lambda: pool.take(20, 0).release())
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    buffer.release()
    waiting.join(10)
    assert not waiting.is_alive()
    assert pool.whole


def test_memory_is_used_again_unless_it_is_large():
    pool = BufferPool(1)
    places = []
    for num_bytes in (1000, 500, 32 << 20, 100):
        with pool.take(num_bytes, 0) as buffer:
            places.append(buffer.values.data_ptr())
    assert places[0] == places[1]
    assert buffer._storage.numel() < 1 << 20


def test_memory_of_a_tile_in_float32_is_kept():
    pool = BufferPool(1)
    num_bytes = TILE_ELEMENTS["cpu"] * 4
    with pool.take(num_bytes, 0) as buffer:
        pass
    assert buffer._storage.numel() >= num_bytes


def test_a_buffer_without_memory_is_not_lost(monkeypatch):
    pool = BufferPool(2)

    def fail(*_, **__):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(buffers.torch, "empty", fail)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no memory"):
                pool.take(10, 0)
    assert pool.whole
    pool.take(10, 0).release()


def test_a_pool_is_kept_unless_buffers_of_it_are_held():
    first = kept_pool(3, pin=False)
    assert kept_pool(3, pin=False) is first
    held = first.take(10, 0)
    second = kept_pool(3, pin=False)
    assert second is not first
    assert second.whole
    held.release()
    assert kept_pool(3, pin=False) is second
