"""Parity of a release that is one GGUF file: read back by the `gguf` package, and held against proven numbers.

The reader is llama.cpp's own in Python, which knows nothing of how the file was laid out. Numbers have to be the merged
ones, or the base's, in the type of the file and in its order of rows. Codes have to be what `gguf.quants` makes of
those numbers a second time. As the same library has made both, each code is dequantized, too, and has to lie within
half a step of the merged number. What is interleaved is turned back here, and compared in the order of the model.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jobs.errors import BadInputError
from jobs.parity_report import TensorCheck
from workers.bases.gguf_files.reading import read_tensors
from workers.bases.gguf_files.tensors import DTYPES, GgufTensor
from workers.files.layout import CheckpointLayout
from workers.files.local import file_errors
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.checks.tally import TensorChecks, finite
from workers.merging.gguf_storage import GgufStorage, read_from
from workers.merging.gguf_writing import tiles_of
from workers.merging.plan import MergePlan
from workers.numerics.kernels.differences import num_different
from workers.numerics.tiles import single_threads, strips_of

_BLOCK = 32
"""Of Q8_0: elements with one scale."""
_STRIP_ELEMENTS = 1 << 15
"""In float64 at once: they stay in a core's cache."""
_ROUNDED = 2.0**-20
"""What dividing and multiplying in float32 may add to half a step, of the step."""


def wrong_fronts(layout: CheckpointLayout, directory: Path) -> list[str]:
    """Return one sentence for each GGUF file whose front or size is not what was planned."""
    wrong = []
    for shard in layout.shards:
        path = directory / shard.name
        with file_errors(f"reading {path}", path), path.open("rb", buffering=0) as file:
            front, num_bytes = file.read(len(shard.header)), os.fstat(file.fileno()).st_size
        if num_bytes != shard.num_bytes:
            wrong.append(f"file {shard.name}: it has {num_bytes} bytes, expected {shard.num_bytes}")
        elif front != shard.header:
            wrong.append(f"file {shard.name}: its metadata is not the one that was planned")
    return wrong


def check_file(
    plan: MergePlan,
    merged_in: Path,
    directory: Path,
    proven: Mapping[str, TensorCheck],
    weights: ArithmeticCheck,
    *,
    num_threads: int,
    stop: Callable[[], None],
) -> TensorChecks:
    """Check every tensor of the GGUF file of a release; arguments and result as of `check_stored`.

    Returns:
        By tensor of the file; that of several weights has what was found about all of them.
    """
    storage = plan.storage
    assert isinstance(storage, GgufStorage)
    (shard,) = plan.output.shards
    try:
        found = read_tensors(directory / shard.name, shard.header)
    except BadInputError as error:
        return TensorChecks(tensors={}, wrong=(str(error),))
    wrong = [
        f"tensor {tensor.name}: expected {tensor.words} in {shard.name}, found "
        f"{found[tensor.name].words if tensor.name in found else 'nothing'}"
        for tensor in storage.tensors
        if tensor.name not in found or tensor.words != found[tensor.name].words
    ]
    wrong += [f"tensor {name}: {shard.name} has it, and no plan" for name in found.keys() - plan.output.tensors.keys()]
    if wrong:
        return TensorChecks(tensors={}, wrong=tuple(wrong))
    check = _Check(plan, merged_in, proven, weights, stop)
    with single_threads(num_threads, "check") as pool:
        checks = [*pool.map(lambda each: check.tensor(each, found[each.name].data), storage.tensors)]
    return TensorChecks(
        tensors={each.tensor: each for each, _ in checks},
        wrong=tuple(sentence for _, sentences in checks for sentence in sentences),
    )


@dataclass(slots=True)
class _Found:
    """What is gathered about a tensor: what is wrong, and, of codes, what they cost."""

    num_different: int = 0
    num_beyond: int = 0
    lost: float = 0.0
    kept: float = 0.0
    delta: float = 0.0


class _Check:
    """Compares tensors of one file with what they are made of."""

    def __init__(
        self,
        plan: MergePlan,
        merged_in: Path,
        proven: Mapping[str, TensorCheck],
        weights: ArithmeticCheck,
        stop: Callable[[], None],
    ) -> None:
        self._base = plan.base
        self._read = read_from(plan.merged, merged_in)
        self._proven = proven
        self._weights = weights
        self._stop = stop

    def tensor(self, tensor: GgufTensor, raw: np.ndarray) -> tuple[TensorCheck, list[str]]:
        """Check one tensor.

        Args:
            tensor: as it was planned.
            raw: uint8 [bytes], as it was read.

        Returns:
            What was found, and a sentence for each thing that is wrong.
        """
        if tensor.values is not None:
            is_right = np.array_equal(raw.view(np.float32), np.array(tensor.values, dtype=np.float32))
            wrong = [] if is_right else [f"tensor {tensor.name}: its values are not those of the configuration"]
            return _unchanged(tensor.name), wrong
        found = _Found()
        size = tensor.matrix[0] * tensor.row_bytes
        for number, source in enumerate(tensor.sources):
            self._stop()
            self._source(tensor, source, raw[number * size : (number + 1) * size], found)
        wrong = []
        if found.num_different:
            makes = f"bytes are not what {tensor.kind.name} makes of" if tensor.is_quantized else "elements are not of"
            wrong.append(f"tensor {tensor.name}: {found.num_different} {makes} the merged {tensor.sources[0]}")
        if found.num_beyond:
            wrong.append(
                f"tensor {tensor.name}: {found.num_beyond} elements lie more than half a step beside the merged ones"
            )
        check = _together(tensor.name, [self._proven.get(source, _unchanged(source)) for source in tensor.sources])
        if tensor.is_quantized:
            survival = found.kept / found.delta if found.delta > 0 and math.isfinite(found.kept) else None
            check = check.model_copy(
                update={"requantization_error": math.sqrt(finite(found.lost)), "survival": survival}
            )
        return check, wrong

    def _source(self, tensor: GgufTensor, source: str, raw: np.ndarray, found: _Found) -> None:
        """Compare what one tensor of the checkpoint became; add to what was found."""
        was, proven = self._base.by_name.get(source), self._proven.get(source)
        if proven is None or not proven.targeted or was is None or was.num_elements != math.prod(tensor.matrix):
            was = None  # no delta, or rows that W does not have
        for rows in tiles_of(tensor, 1 if was is None else self._weights.row_alignment(was)):
            shipped = torch.from_numpy(np.array(raw[rows.start * tensor.row_bytes : rows.stop * tensor.row_bytes]))
            turned, wanted = _turned_back(tensor, tensor.decode(shipped)), self._read(source, rows)
            if not tensor.is_quantized:
                found.num_different += num_different(turned, wanted.to(DTYPES[tensor.kind]))
                continue
            found.num_different += num_different(shipped, tensor.encode(tensor.interleaved(wanted)))
            before = None if was is None else self._weights.weight(was, rows)
            for part in strips_of(wanted.shape[0], wanted.shape[1], _STRIP_ELEMENTS):
                _measure(found, turned[part], wanted[part], None if before is None else before[part])


def _turned_back(tensor: GgufTensor, rows_OI: torch.Tensor) -> torch.Tensor:
    """Return rows of whole heads in the order of the model: pairs become halves.

    As `LlamaTensorProcessor._reverse_permute_weights` of transformers.
    """
    if tensor.num_heads is None:
        return rows_OI
    pairs = rows_OI.reshape(-1, tensor.row_alignment // 2, 2, rows_OI.shape[1])
    return pairs.transpose(2, 1).reshape(rows_OI.shape)


def _measure(found: _Found, shipped_OI: torch.Tensor, wanted_OI: torch.Tensor, before_OI: torch.Tensor | None) -> None:
    """Gather how far numbers of Q8_0 are from what they should be, and how much of a delta is left.

    A step is the largest of a block over 127, and no element is further away than half of it. The scale in the file is
    that step in float16, so that a code of up to 127 may be off by as many times as that is rounded, besides: half a
    unit of its 11 bits, or of the smallest ones.
    """
    wanted = wanted_OI.double().reshape(-1, _BLOCK)
    errors = shipped_OI.double().reshape(-1, _BLOCK).sub_(wanted)
    steps = wanted.abs().amax(dim=1, keepdim=True).div_(127)
    bounds = steps * (0.5 + _ROUNDED + 127 * 2.0**-11) + 127 * 2.0**-25
    found.num_beyond += errors.numel() - int((errors.abs() <= bounds).sum())  # NaN compares false with everything
    error, added = errors.view(-1), wanted.view(-1)
    found.lost += float(error.dot(error))
    if before_OI is not None:
        added = added.sub_(before_OI.double().view(-1))
        delta = float(added.dot(added))
        found.delta += delta
        found.kept += delta + float(added.dot(error))  # shipped - W is what was added and the error


def _together(name: str, checks: Sequence[TensorCheck]) -> TensorCheck:
    """Return what was found about several weights that are one tensor of a file."""
    if len(checks) == 1:
        return checks[0].model_copy(update={"tensor": name})
    deltas = [(check.survival, check.delta_norm**2) for check in checks if check.survival is not None]
    squares = sum(square for _, square in deltas)
    errors = [check.quantization_error for check in checks if check.quantization_error is not None]
    return TensorCheck(
        tensor=name,
        changed=any(check.changed for check in checks),
        targeted=any(check.targeted for check in checks),
        max_abs_error=max(check.max_abs_error for check in checks),
        rounding_excess=max(check.rounding_excess for check in checks),
        num_bad_elements=sum(check.num_bad_elements for check in checks),
        weight_norm=math.hypot(*(check.weight_norm for check in checks)),
        delta_norm=math.hypot(*(check.delta_norm for check in checks)),
        quantization_error=math.hypot(*errors) if errors else None,
        survival=sum(share * square for share, square in deltas) / squares if squares else None,
    )


def _unchanged(name: str) -> TensorCheck:
    return TensorCheck(tensor=name, changed=False, max_abs_error=0.0, rounding_excess=0.0)
