"""What takes the bytes of a pass to their files: buffers, and the threads that write and hash them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from workers.files.buffers import BufferPool, kept_pool

_HELD_PER_THREAD = 2
"""Of a thread that computes, at most: a tile, and what becomes of it in the form of another release."""
_BUFFERS_PER_THREAD = 2 + _HELD_PER_THREAD
"""Tiles on their way to files, for each thread that computes: those in its hands, the others written and hashed."""
_SPARE_BUFFERS = 6
"""More of them on the CPU, where threads that compute and threads that hash take the cores from each other in turns: so
many that the disk has something to write meanwhile."""
_CARRIERS_PER_THREAD = 2
"""Threads that write and hash, for each thread that computes; half of the time they wait for the disk."""


def num_buffers(num_threads: int, *, pin: bool) -> int:
    """Return how many tiles of a pass are on their way to files, at most.

    Args:
        num_threads: threads that compute.
        pin: whether a device copies into the buffers.
    """
    return _BUFFERS_PER_THREAD * num_threads + (0 if pin else _SPARE_BUFFERS)


@dataclass(frozen=True, slots=True)
class Conveyor:
    """What takes the bytes of a pass to their files."""

    buffers: BufferPool
    threads: ThreadPoolExecutor
    """Each writes one buffer at a time, and hashes what is due of its file. They never wait for a buffer themselves."""
    num_spare: int
    """Buffers that stay free for the threads that compute, however many wait to be hashed: as many as all of them hold
    together, so that none waits for another for ever."""

    @classmethod
    def of_threads(cls, num_threads: int, *, pin: bool = False) -> Self:
        """Return one for a number of threads that compute.

        Args:
            num_threads: how many.
            pin: whether a device copies into the buffers.
        """
        num_carriers = _CARRIERS_PER_THREAD * num_threads
        return cls(
            buffers=kept_pool(num_buffers(num_threads, pin=pin), pin=pin),
            threads=ThreadPoolExecutor(num_carriers, thread_name_prefix="write"),
            num_spare=_HELD_PER_THREAD * num_threads,
        )

    def close(self) -> None:
        """Wait until all is written and hashed that was handed over. Idempotent."""
        self.threads.shutdown()
