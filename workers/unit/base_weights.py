"""The weights of a base that are no plain numbers: as it stores them, or made 4-bit once, for all passes."""

import functools
import threading
from collections.abc import Callable, Sequence

from workers.bases.quantized_base import QuantizedBase
from workers.bases.resident_bases import ResidentBases
from workers.files.memory import give_back
from workers.merging.base_plan import BasePlan
from workers.merging.context import Context
from workers.merging.job import Job


def open_weights(
    base: BasePlan,
    pass_key: str,
    jobs: Sequence[Job],
    residents: ResidentBases,
    context: Context,
    *,
    on_read: Callable[[int], None],
) -> QuantizedBase | None:
    """Open what some jobs are merged into, mapped; of what is to be in 4 bits, what they take is made.

    Args:
        base: the planned base.
        pass_key: of the jobs.
        jobs: something of each is to be merged.
        residents: bases that passes before this one have left open.
        context: of the unit.
        on_read: is told of bytes read of the base; by one thread at a time.

    Returns:
        The weights; None where all of them are plain numbers.

    Raises:
        CancelledError: all jobs were.
    """
    task = base.quantization
    if base.form is not None:
        return base.stored_weights(context.device)
    if task is None:
        return None
    ids = [job.id for job in jobs]
    context.tracker.enter("quantize", ids)
    lock = threading.Lock()

    def on_bytes(num_bytes: int) -> None:
        context.tracker.check_all(ids)
        with lock:
            on_read(num_bytes)

    with context.tracker.timed("quantize"):
        cache = context.cache
        quantized = residents.get(pass_key, task.key(context.device), functools.partial(cache.empty, task))
        wanted = frozenset[str]().union(*(job.in_work.base_names for job in jobs))
        cache.prepare(quantized, task, wanted, on_bytes)
        give_back()
        return quantized
