"""What a planned merge will take: bytes, memory and time, told before anything is read.

Throughputs were measured on two cores of an AMD EPYC with everything in the page cache (`make bench` measures them
anew); they are for a person who waits, nothing depends on them. Units are admitted by the memory stated here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from workers.behaviour import estimate_peak_bytes
from workers.lanes.adapter import open_adapter
from workers.plan import MergePlan
from workers.tiles import TILE_ELEMENTS
from workers.writer import BUFFERS_PER_THREAD

_LIBRARY_BYTES = 390_000_000
"""Memory of a process that has imported torch, transformers, PEFT, bitsandbytes and Numba (CPU builds)."""

_PIECES_BYTES = 8 << 20
"""Of one thread on the CPU: deltas in float32, as they are merged and as they are checked, and what else is small."""

_TILE_ELEMENT_BYTES = 24
"""What a weight that is taken whole takes for each of its elements."""

_QUANTIZE_BYTES = 48 << 20
"""Scratch of one thread that quantizes: the tile as stored and on its way back, in 4-bit, and buffers."""

_MODULE_ELEMENT_BYTES = 56
"""What the check of a module that PEFT merged holds of each of its weights: up to seven arrays of float64, of a layer,
its plain form, their states, and the squares its bound is made of."""

_MERGE_RATE = 0.45e9
_ARITHMETIC_RATE = 0.8e9
_QUANTIZE_RATE = 0.45e9
_BEHAVIOUR_RATE = 0.012e9
"""Bytes of merged weights (of stored ones, for quantizing) a second and core."""

_SVD_RATE = 2e9
"""Rows x columns x the smaller of both, a second, in one thread; measured on a core of an AMD EPYC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one job will do and take, if it is merged alone."""

    request_id: str
    merges_into: str
    """What the delta is added to, in words."""
    num_tensors: int
    num_changed_tensors: int
    num_parameters: int
    num_changed_parameters: int
    """Parameters that get a delta."""
    bytes_read: int
    bytes_written: int
    bytes_computed: int
    """Of the bytes written, those that are computed; the rest is copied from the base."""
    peak_memory_bytes: int
    """Host memory of the process at its peak, mapped file pages not counted, parity included."""
    seconds: float
    merge_key: str


def merges_into(plan: MergePlan) -> str:
    """Say in words what the delta is added to."""
    quantization = plan.request.base_quantization
    if plan.base.stored_in_4bit:
        return f"the base's stored {quantization} weights, dequantized"
    if plan.base.quantization is not None:
        return f"the base's weights through {quantization} and back ({plan.base.quantization.num_weights} tensors)"
    return "the base's own weights"


def estimate(plan: MergePlan, num_threads: int) -> Estimate:
    """Estimate one job from its plan.

    Args:
        plan: of the job.
        num_threads: threads that compute.
    """
    written = plan.output.num_bytes
    quantized = sum(tensor.num_bytes for tensor in plan.base.tensors if tensor.stored is None)
    seconds = written / _MERGE_RATE + written / _ARITHMETIC_RATE
    if plan.base.quantization is not None:
        seconds += quantized / _QUANTIZE_RATE
    if plan.request.parity.level == "full":
        seconds += 2 * written / _BEHAVIOUR_RATE
    if plan.request.compare:
        seconds += written / _MERGE_RATE + 2 * written / _BEHAVIOUR_RATE
        if plan.base.quantization is None:
            seconds += written / _QUANTIZE_RATE
    sizes = {tensor.name: tensor.num_bytes // tensor.dtype.itemsize for tensor in plan.tensors}
    return Estimate(
        request_id=plan.request.id,
        merges_into=merges_into(plan),
        num_tensors=len(plan.tensors),
        num_changed_tensors=len(plan.changed),
        num_parameters=sum(sizes.values()),
        num_changed_parameters=sum(sizes[name] for name in plan.changed),
        bytes_read=plan.num_bytes_read,
        bytes_written=written,
        bytes_computed=plan.num_bytes_changed,
        peak_memory_bytes=peak_memory_bytes(plan, num_threads),
        seconds=seconds / num_threads + combination_seconds(plan),
        merge_key=plan.merge_key,
    )


def peak_memory_bytes(plan: MergePlan, num_threads: int) -> int:
    """Return the host memory of the process at its peak, mapped file pages not counted.

    Loading whole models for the behavioural check grows with the model's size; nothing else does.
    """
    peak = _LIBRARY_BYTES + max(pass_bytes([plan], num_threads), combination_bytes(plan))
    if plan.request.parity.level == "arithmetic":
        return peak
    return max(peak, estimate_peak_bytes(plan))


def pass_bytes(plans: Sequence[MergePlan], num_threads: int) -> int:
    """Return the host memory that a pass takes at its peak, on top of the libraries and without the behavioural check.

    Streaming is bounded by tiles and by the adapter tensors of the weights in work, and merging by PEFT by the adapter
    and one module, whatever the model's size.

    Args:
        plans: of the jobs of the pass.
        num_threads: threads that compute.
    """
    base = plans[0].base
    streaming = num_threads * (_tile_bytes(plans) + sum(_operand_bytes(plan) for plan in plans))
    if base.quantization is not None or any(plan.request.compare for plan in plans):
        quantizing = num_threads * _QUANTIZE_BYTES + _quantized_whole(plans[0])
        if any(plan.request.quantization_options.bnb_4bit_use_double_quant for plan in plans):
            # Scales are quantized with a weight's last tile: until then it is held in 4-bit, and twice at the end.
            largest = max((t.num_bytes // t.dtype.itemsize for t in base.tensors if t.stored is None), default=0)
            quantizing += num_threads * 5 * largest // 4
        streaming = max(streaming, quantizing)
    return max(streaming, *map(_bytes_by_peft, plans))


def _tile_bytes(plans: Sequence[MergePlan]) -> int:
    """Return the scratch of one thread: a tile as it is read for the merge and for its check, and buffers for it.

    A weight whose transpose is in 4-bit is taken whole.
    """
    base = plans[0].base
    stored = max((t.stored.dtype.itemsize if t.stored else t.dtype.itemsize for t in base.tensors), default=0)
    merged = max((t.dtype.itemsize for t in base.tensors), default=0)
    tile = TILE_ELEMENTS["cpu"] * (2 * stored + BUFFERS_PER_THREAD * merged)
    whole = [t.num_elements for t in base.tensors if t.stored is None and t.name in base.transposed]
    return _PIECES_BYTES + max(tile, _TILE_ELEMENT_BYTES * max(whole, default=0))


def _operand_bytes(plan: MergePlan) -> int:
    """Return what the adapter's tensors of one weight take.

    In float32 for the merge and for the check, which has A in float64, too, and squares it.
    """
    sizes = [(delta.a_RI.num_elements, delta.b_OR.num_elements) for delta in plan.deltas.values()]
    return max((8 * (a + b) + 16 * a for a, b in sizes), default=0)


def _quantized_whole(plan: MergePlan) -> int:
    """Return what weights take that are not quantized in tiles: a transpose, or what a group of tensors is made into.

    The weight as stored, made and on its way back, in its own dtype, and their difference in float32.
    """
    task = plan.base.quantization
    if task is None:
        return 0
    sizes = [math.prod(plan.base.by_name[name].shape) for name in task.transposed]
    sizes += [sum(math.prod(plan.base.by_name[name].shape) for name in group.stored) for group in task.groups]
    return 20 * max(sizes, default=0)


def _bytes_by_peft(plan: MergePlan) -> int:
    """Return what merging by PEFT takes: the adapter in float32, once as it is read and once in PEFT, and a module."""
    if not plan.by_peft:
        return 0
    adapter = sum(spec.num_elements for spec in plan.opened.tensors.values())
    widest = max(math.prod(tensor.shape) for tensor in plan.tensors if tensor.name in plan.by_peft)
    return 2 * 4 * adapter + _MODULE_ELEMENT_BYTES * widest


def combination_bytes(plan: MergePlan) -> int:
    """Return the memory that combining the adapters of a job takes, on top of the libraries; 0 for a single adapter."""
    combination = plan.request.combination
    if combination is None:
        return 0
    parts = [open_adapter(part.directory) for part in plan.adapter.parts]
    num_elements = sum(spec.num_elements for adapter in (*parts, plan.opened) for spec in adapter.tensors.values())
    largest = 0
    for num_rows, num_columns in _decomposed(plan):
        # The deltas, stacked and weighted; then U, V and the work space of the decomposition, which is as large.
        full = combination.arguments()["svd_full_matrices"]
        both = num_rows**2 + num_columns**2 if full else 2 * num_rows * num_columns
        size = num_rows * num_columns
        largest = max(largest, (3 * len(parts) + 2) * size, 2 * both + 3 * size)
    return 4 * (num_elements + largest)


def combination_seconds(plan: MergePlan) -> float:
    """Return how long combining the adapters of a job takes: next to nothing, unless whole deltas are decomposed."""
    return sum(rows * columns * min(rows, columns) / _SVD_RATE for rows, columns in _decomposed(plan))


def _decomposed(plan: MergePlan) -> list[tuple[int, int]]:
    """Return rows and columns of the deltas that are decomposed."""
    combination = plan.request.combination
    if combination is None or not combination.type.decomposes:
        return []
    return [(tensor.num_rows, tensor.num_columns) for tensor in plan.tensors if tensor.name in plan.changed]
