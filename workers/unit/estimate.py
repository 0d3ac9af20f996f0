"""What a planned merge will take: bytes, memory and time, told before anything is read.

Throughputs were measured on two cores of an AMD EPYC with everything in the page cache (`make bench` measures them
anew); they are for a person who waits, nothing depends on them.
"""

from dataclasses import dataclass

from jobs.request import MergeRequest
from workers.merging.outcomes import Failure
from workers.merging.plan import MergePlan
from workers.unit.footprint import decomposed, device_bytes, peak_bytes, resident_bytes

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
    peak_device_memory_bytes: int
    """Memory of the GPU at the merge's peak, what CUDA and torch take beside it not counted; 0 if it is on the CPU.
    Parity level `full` and `compare` run whole models there afterwards, as far as they fit."""
    seconds: float
    merge_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What one request would do, or why it cannot."""

    request: MergeRequest
    estimate: Estimate | None
    failure: Failure | None
    notes: tuple[str, ...] = ()
    """Those of the plan."""


def merges_into(plan: MergePlan) -> str:
    """Say in words what the delta is added to."""
    quantization = plan.request.base_quantization
    if plan.base.form is not None:
        words = quantization if quantization.converts else plan.base.form.words
        return f"the base's stored {words} weights, dequantized"
    if plan.base.quantization is not None:
        return f"the base's weights through {quantization} and back ({plan.base.quantization.num_weights} tensors)"
    return "the base's own weights"


def estimate(plan: MergePlan, num_threads: int, device: str) -> Estimate:
    """Estimate one job from its plan.

    Args:
        plan: of the job.
        num_threads: threads that compute.
        device: `cpu` or `cuda`, where they compute.
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
        peak_memory_bytes=peak_bytes(plan, num_threads, device),
        peak_device_memory_bytes=(
            resident_bytes(plan.base) + device_bytes([plan], num_threads) if device == "cuda" else 0
        ),
        seconds=seconds / num_threads + combination_seconds(plan),
        merge_key=plan.merge_key,
    )


def combination_seconds(plan: MergePlan) -> float:
    """Return how long combining the adapters of a job takes: next to nothing, unless whole deltas are decomposed."""
    return sum(rows * columns * min(rows, columns) / _SVD_RATE for rows, columns in decomposed(plan))
