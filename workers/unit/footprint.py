"""What a pass takes of memory, on the host and on a GPU: told before anything is read, and what units are admitted by.

What it says of a GPU is what torch takes there; what CUDA takes for itself is not in it.
"""

import math
from collections.abc import Sequence

from workers.adapters.adapter import open_adapter
from workers.bases.forms import StoredForm
from workers.bases.forms.bitsandbytes_4bit import BITSANDBYTES_4BIT
from workers.files.conveyor import num_buffers
from workers.merging.base_plan import BasePlan
from workers.merging.gguf_storage import GgufStorage
from workers.merging.plan import MergePlan
from workers.numerics.tiles import TILE_ELEMENTS
from workers.parity.peak import estimate_peak_bytes

_LIBRARY_BYTES = {"cpu": 420_000_000, "cuda": 900_000_000}
"""Memory of a process that has torch, transformers, PEFT, bitsandbytes, Numba and compiled loops at hand, by the device
it works on."""

_PIECES_BYTES = 8 << 20
"""Of one thread on the CPU: deltas in float32, as they are merged and as they are checked, and what else is small."""

_TILE_ELEMENT_BYTES = 24
"""What a weight that is taken whole takes for each of its elements."""

_QUANTIZE_BYTES = {"cpu": 48 << 20, "cuda": 64 << 20}
"""Scratch of one thread that quantizes: the tile as stored and on its way back, in 4-bit, and buffers, by device."""

_REQUANTIZE_BYTES = 96 << 20
"""Scratch of one thread that quantizes merged weights again: rows of them in float32, scaled, rounded and packed."""

_FORM_ELEMENT_BYTES = 6
"""Of one thread that quantizes tiles as they are merged, for each element, beside its numbers: codes once more, scales
while they are computed (up to twenty arrays of float32, with one for 32 elements), and a piece that is dequantized."""

_GGUF_BYTES = 128 << 20
"""Scratch of one thread that writes or checks a GGUF file: a tile in float32, turned, as codes, and back."""

_FRONT_FACTOR = 100
"""Bytes that the reader of gguf 0.19 takes for each byte before the tensors: of 200,000 tokens 530 MB, measured."""

_PRODUCT_BYTES = 2 << 20
"""What cuBLAS keeps of a GPU for each thread."""

_WEIGHTS_PER_THREAD = 2
"""Weights in work for each thread, at most: `Walk` takes tiles of fewer shards than that in turns."""

_MODULE_ELEMENT_BYTES = 56
"""What the check of a module that PEFT merged holds of each of its weights: up to seven arrays of float64, of a layer,
its plain form, their states, and the squares its bound is made of."""


def peak_bytes(plan: MergePlan, num_threads: int, device: str) -> int:
    """Return the host memory of the process at its peak, mapped file pages not counted.

    Loading whole models for the behavioural check grows with the model's size; nothing else does.

    Args:
        plan: of a job that is merged alone.
        num_threads: threads that compute.
        device: `cpu` or `cuda`, where they compute.
    """
    peak = _LIBRARY_BYTES[device] + max(pass_bytes([plan], num_threads, device), combination_bytes(plan))
    if plan.request.parity.level == "arithmetic":
        return peak
    return max(peak, estimate_peak_bytes(plan))


def pass_bytes(plans: Sequence[MergePlan], num_threads: int, device: str) -> int:
    """Return the host memory that a pass takes at its peak, on top of the libraries and without the behavioural check.

    Streaming is bounded by tiles and by the adapter tensors of the weights in work, and merging by PEFT by the adapter
    and one module, for a model of any size.

    Args:
        plans: of the jobs of the pass.
        num_threads: threads that compute.
        device: `cpu` or `cuda`, where they compute.
    """
    base = plans[0].base
    operands = _WEIGHTS_PER_THREAD * sum(_operand_bytes(plan) for plan in plans)
    streaming = num_threads * (_tile_bytes(plans, device) + _formed_bytes(plans, device) + operands)
    quantizing = 0
    if base.quantization is not None or any(plan.request.compare for plan in plans):
        quantizing = num_threads * _QUANTIZE_BYTES[device] + _quantized_whole(plans[0])
        if any(plan.request.quantization_options.bnb_4bit_use_double_quant for plan in plans):
            # Scales are quantized with a weight's last tile: until then it is held in 4-bit, and twice at the end.
            largest = max((t.num_bytes // t.dtype.itemsize for t in base.tensors if t.stored is None), default=0)
            quantizing += num_threads * 5 * largest // 4
    by_peft = max(map(_bytes_by_peft, plans))
    requantizing = num_threads * max(map(_requantized_bytes, plans))
    # Buffers stay from pass to pass, and so does what was pinned.
    scratch = max(streaming, quantizing, by_peft) if device == "cpu" else streaming + quantizing + by_peft
    scratch = max(scratch, requantizing + max(map(_read_back_bytes, plans)))
    return _buffer_bytes(base, num_threads, device) + scratch


def resident_bytes(base: BasePlan) -> int:
    """Return the bytes of a base in a stored form, codes and scales, that a GPU holds as long as jobs use it."""
    sizes = (tensor.num_elements for tensor in base.tensors if tensor.stored is None)
    return sum(map(_form(base).held_bytes, sizes))


def passing_bytes(base: BasePlan, num_threads: int) -> int:
    """Return what a GPU takes of a base in a stored form that it does not hold: codes and scales of the tiles in work.

    A weight whose transpose is in 4-bit comes whole.

    Args:
        base: the planned base.
        num_threads: threads that compute, each with a tile for the merge and one for its check.
    """
    sizes = [tensor.num_elements for tensor in base.tensors if tensor.stored is None]
    whole = [tensor.num_elements for tensor in base.tensors if tensor.stored is None and tensor.name in base.transposed]
    size = max([min(max(sizes, default=0), TILE_ELEMENTS["cuda"]), *whole])
    return num_threads * 2 * _form(base).held_bytes(size)


def _form(base: BasePlan) -> StoredForm:
    """Return what its weights are in that are not plain: as they are stored, or as they are converted."""
    return base.form or BITSANDBYTES_4BIT


def device_bytes(plans: Sequence[MergePlan], num_threads: int) -> int:
    """Return the memory of a GPU that a pass takes at its peak, on top of the base in 4-bit that it may hold.

    Args:
        plans: of the jobs of the pass.
        num_threads: threads that compute, each on a stream of its own.
    """
    base = plans[0].base
    widest = max((t.stored.dtype.itemsize if t.stored else t.dtype.itemsize for t in base.tensors), default=0)
    merged = max((t.dtype.itemsize for t in base.tensors), default=0)
    # W as it is read and as it is checked, the sum in float32, and what it is rounded to.
    tile = TILE_ELEMENTS["cuda"] * (2 * widest + 4 + merged)
    whole = [t.num_elements for t in base.tensors if t.stored is None and t.name in base.transposed]
    tile = max(tile, _TILE_ELEMENT_BYTES * max(whole, default=0))
    operands = sum(
        max((4 * (d.a_RI.num_elements + d.b_OR.num_elements) for d in plan.deltas.values()), default=0)
        for plan in plans
    )
    return num_threads * (tile + _WEIGHTS_PER_THREAD * operands + _PRODUCT_BYTES)


def _buffer_bytes(base: BasePlan, num_threads: int, device: str) -> int:
    """Return what tiles take on their way to files."""
    merged = max((tensor.dtype.itemsize for tensor in base.tensors), default=0)
    return num_buffers(num_threads, pin=device == "cuda") * TILE_ELEMENTS[device] * merged


def _tile_bytes(plans: Sequence[MergePlan], device: str) -> int:
    """Return the scratch of one thread: a tile as it is read for the merge and for its check.

    A weight whose transpose is in 4-bit is taken whole.
    """
    base = plans[0].base
    stored = max((t.stored.dtype.itemsize if t.stored else t.dtype.itemsize for t in base.tensors), default=0)
    is_in_4bit = any(t.stored is None for t in base.tensors)
    num_read = 3 if device == "cuda" and is_in_4bit else 2  # what is in 4-bit and what is not: both are pinned
    tile = TILE_ELEMENTS[device] * num_read * stored
    whole = [t.num_elements for t in base.tensors if t.stored is None and t.name in base.transposed]
    return _PIECES_BYTES + max(tile, _TILE_ELEMENT_BYTES * max(whole, default=0))


def _formed_bytes(plans: Sequence[MergePlan], device: str) -> int:
    """Return what a thread takes that quantizes tiles as they are merged: numbers that go into no file, and codes.

    Several forms of one merge take the same memory one after the other.
    """
    if not any(plan.can_quantize_tiles for plan in plans):
        return 0
    merged = max(tensor.dtype.itemsize for plan in plans for tensor in plan.tensors)
    return TILE_ELEMENTS[device] * (merged + _FORM_ELEMENT_BYTES)


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


def _requantized_bytes(plan: MergePlan) -> int:
    """Return what a thread takes that quantizes a merged weight again: codes, twice at the end, and pieces of it."""
    if plan.can_quantize_tiles:
        return 0
    if isinstance(plan.storage, GgufStorage):
        return _GGUF_BYTES
    sizes = [plan.base.by_name[name].num_elements for name in plan.requantized]
    return _REQUANTIZE_BYTES + 4 * max(sizes) if sizes else 0


def _read_back_bytes(plan: MergePlan) -> int:
    """Return what reading a GGUF file back takes: the `gguf` package makes objects of each token and merge."""
    if not isinstance(plan.storage, GgufStorage):
        return 0
    return _FRONT_FACTOR * sum(len(shard.header) for shard in plan.output.shards)


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
    parts = [open_adapter(part.directory, plan.opened.inert_fields, part.beside) for part in plan.adapter.parts]
    num_elements = sum(spec.num_elements for adapter in (*parts, plan.opened) for spec in adapter.tensors.values())
    largest = 0
    for num_rows, num_columns in decomposed(plan):
        # The deltas, stacked and weighted; then U, V and the work space of the decomposition, which is as large.
        full = combination.arguments()["svd_full_matrices"]
        both = num_rows**2 + num_columns**2 if full else 2 * num_rows * num_columns
        size = num_rows * num_columns
        largest = max(largest, (3 * len(parts) + 2) * size, 2 * both + 3 * size)
    return 4 * (num_elements + largest)


def decomposed(plan: MergePlan) -> list[tuple[int, int]]:
    """Return rows and columns of the deltas that are decomposed."""
    combination = plan.request.combination
    if combination is None or not combination.type.decomposes:
        return []
    return [(tensor.num_rows, tensor.num_columns) for tensor in plan.tensors if tensor.name in plan.changed]
