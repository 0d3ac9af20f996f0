"""Parity of releases in the base's form: every stored tensor, from the base's bytes or from proven merged numbers.

What the base has bytes of has to be those. What merged is plain has to be as it was proven. And each weight that is
quantized again has to have the very parts that the form's library makes of the proven numbers; how much of the delta
outlives that is measured on what the shipped parts stand for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from jobs.parity_report import TensorCheck
from workers.files.tensor_io import mapped, opened, read_into
from workers.merging.checks.module_checks import ModuleChecks
from workers.merging.checks.tally import finite
from workers.merging.plan import MergePlan
from workers.merging.storing import base_bytes_of, parts_of, quantized
from workers.numerics.rounding import BITS
from workers.numerics.tiles import TILE_ELEMENTS, Tiling, single_threads

_PIECE_BYTES = 4 << 20


def check_stored(
    plan: MergePlan,
    merged_in: Path,
    directory: Path,
    proven: Mapping[str, TensorCheck],
    *,
    num_threads: int,
    stop: Callable[[], None],
) -> ModuleChecks:
    """Check every tensor of the shards of a release in the base's form.

    Args:
        plan: of the job, or the part of it in work.
        merged_in: directory of the merged numbers.
        directory: of the release's shards.
        proven: what was found about the merged numbers, by tensor.
        num_threads: tensors looked at at the same time.
        stop: raises CancelledError when the work should stop; called once per tensor.

    Returns:
        By stored tensor; that of a weight's codes has what was found about the weight.
    """
    check = _Check(plan, merged_in, directory, proven, stop)
    with single_threads(num_threads, "check") as pool:
        found = [*pool.map(check.plain, check.whole), *pool.map(check.requantized, plan.requantized)]
    return ModuleChecks(
        tensors={each.tensor: each for checks, _ in found for each in checks},
        wrong=tuple(sentence for _, wrong in found for sentence in wrong),
    )


_Found = tuple[list[TensorCheck], list[str]]


class _Check:
    def __init__(
        self,
        plan: MergePlan,
        merged_in: Path,
        directory: Path,
        proven: Mapping[str, TensorCheck],
        stop: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._merged_in = merged_in
        self._directory = directory
        self._proven = proven
        self._stop = stop
        self._of_base = base_bytes_of(plan)
        parts = {stored for each in plan.requantized.values() for stored in each.names}
        self.whole = [name for name in plan.output.tensors if name not in parts]
        """Stored tensors that are there as they are elsewhere."""

    def plain(self, name: str) -> _Found:
        """Check a tensor that is there as the base has it, or as it was merged."""
        self._stop()
        of_base = name in self._of_base
        source = self._plan.base.source.directory if of_base else self._merged_in
        num_wrong = self._num_different(name, source, of_base=of_base)
        if of_base:
            same = TensorCheck(
                tensor=name, changed=False, max_abs_error=0.0, rounding_excess=0.0, num_bad_elements=num_wrong
            )
            return [same], []
        wrong = [f"tensor {name}: {num_wrong} bytes are not those that were merged"] if num_wrong else []
        return [self._proven[name]], wrong

    def requantized(self, name: str) -> _Found:
        """Check the parts of a weight that was quantized again."""
        self._stop()
        plan, base = self._plan, self._plan.base
        assert base.form is not None
        parts, before = plan.requantized[name], parts_of(base, plan.requantized[name])
        shipped = {stored: self._shipped(stored) for stored in parts.names}
        weight = mapped(self._merged_in / plan.merged.tensors[name][0].name, name)
        expected = quantized(base, name, parts, before, weight)
        wrong = [
            f"tensor {stored}: {number} elements are not what {base.form.words} makes of the merged {name}"
            for stored in parts.names
            if (number := _num_different(shipped[stored], expected[stored]))
        ]
        changed = {stored: _num_different(shipped[stored], before[stored]) > 0 for stored in parts.names}
        lost, kept, delta = 0.0, 0.0, 0.0
        for was, is_to_be, is_ in self._tiles(name, before, shipped, weight):
            lost += float((is_ - is_to_be).square().sum())
            kept += float(((is_ - was) * (is_to_be - was)).sum())
            delta += float((is_to_be - was).square().sum())
        figures = {
            "tensor": parts.codes,
            "changed": any(changed.values()),
            "survival": kept / delta if delta > 0 and math.isfinite(kept) else None,
            "requantization_error": math.sqrt(finite(lost)),
        }
        checks = [
            TensorCheck(tensor=stored, changed=changed[stored], targeted=True, max_abs_error=0.0, rounding_excess=0.0)
            for stored in parts.beside.values()
        ]
        return [self._proven[name].model_copy(update=figures), *checks], wrong

    def _tiles(
        self,
        name: str,
        before: Mapping[str, torch.Tensor],
        shipped: Mapping[str, torch.Tensor],
        weight: torch.Tensor,
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield a weight before the merge, merged, and as it ships, in float64: tiles of it."""
        form, parts = self._plan.base.form, self._plan.requantized[name]
        assert form is not None
        was, is_ = (form.restore(name, parts, tensors, weight.dtype, transposed=False) for tensors in (before, shipped))
        for rows in Tiling.of(was.shape, was.row_alignment, TILE_ELEMENTS["cpu"]).rows:
            tile = is_.dequantize_rows(rows.start, rows.stop)
            merged = weight.view(-1, tile.shape[1])[rows]
            yield was.dequantize_rows(rows.start, rows.stop).double(), merged.double(), tile.double()

    def _shipped(self, stored: str) -> torch.Tensor:
        return mapped(self._directory / self._plan.output.tensors[stored][0].name, stored)

    def _num_different(self, name: str, source: Path, *, of_base: bool) -> int:
        """Return how many bytes of a tensor are others than in the place it comes from."""
        layout = self._plan.base.layout if of_base else self._plan.merged
        num_different = 0
        places = [(source, layout.tensors[name]), (self._directory, self._plan.output.tensors[name])]
        paths = [directory / shard.name for directory, (shard, _) in places]
        specs = [spec for _, (_, spec) in places]
        with opened(paths[0]) as one, opened(paths[1]) as other:
            for offset in range(0, specs[0].num_bytes, _PIECE_BYTES):
                pieces = []
                for descriptor, path, spec in zip((one, other), paths, specs, strict=True):
                    piece = torch.empty(min(_PIECE_BYTES, spec.num_bytes - offset), dtype=torch.uint8)
                    read_into(descriptor, path, piece, spec.begin + offset)
                    pieces.append(piece)
                num_different += _num_different(*pieces)
        return num_different


def _num_different(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return how many elements of two tensors have other bits; all, where their dtypes or shapes differ."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return max(one.numel(), other.numel(), 1)
    bits = BITS[one.dtype.itemsize]
    return int((one.view(bits) != other.view(bits)).sum())
