"""Parity of releases in a form: every stored tensor, from the base's bytes or from proven merged numbers.

What the base has bytes of has to be those. What is plain has to be as it was proven. And each weight that was quantized
has to have the very parts that the form's library makes of the proven numbers; how much of the delta outlives that is
measured on what the shipped parts stand for.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from jobs.parity_report import TensorCheck
from workers.files.tensor_io import mapped, opened, read_into
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.checks.remaining import Remains, checks_of_parts, remains_of
from workers.merging.checks.tally import TensorChecks
from workers.merging.plan import MergePlan
from workers.merging.storage import WeightStorage
from workers.merging.storing import base_bytes_of, numbers_of
from workers.numerics.kernels.differences import num_different
from workers.numerics.tiles import TileBuffers, columns_of, single_threads

_PIECE_BYTES = 4 << 20


def check_stored(
    plan: MergePlan,
    merged_in: Path,
    directory: Path,
    proven: Mapping[str, TensorCheck],
    weights: ArithmeticCheck,
    *,
    num_threads: int,
    stop: Callable[[], None],
) -> TensorChecks:
    """Check every tensor of the shards of a release in a form.

    Args:
        plan: of the job, or the part of it in work.
        merged_in: directory of the merged numbers.
        directory: of the release's shards.
        proven: what was found about the merged numbers, by tensor.
        weights: reads what was merged into.
        num_threads: tensors looked at at the same time.
        stop: raises CancelledError when the work should stop; called once per tensor.

    Returns:
        By stored tensor; that of a weight's codes has what was found about the weight.
    """
    check = _Check(plan, (merged_in, directory), proven, weights, stop)
    with single_threads(num_threads, "check") as pool:
        found = [*pool.map(check.plain, check.whole), *pool.map(check.requantized, plan.requantized)]
    return TensorChecks(
        tensors={each.tensor: each for checks, _ in found for each in checks},
        wrong=tuple(sentence for _, wrong in found for sentence in wrong),
    )


def survivals(
    plan: MergePlan,
    names: Sequence[str],
    merged_in: Path,
    proven: Mapping[str, TensorCheck],
    weights: ArithmeticCheck,
    *,
    num_threads: int,
    stop: Callable[[], None],
) -> Mapping[str, float | None]:
    """Return how much of the delta would be left of weights that are quantized: as `check_stored` finds it later.

    Args:
        plan: of the job, or the part of it in work; nothing of the release is written.
        names: of the weights.
        merged_in: directory of the merged numbers.
        proven: what was found about the merged numbers, by tensor.
        weights: reads what was merged into.
        num_threads: weights quantized at the same time.
        stop: raises CancelledError when the work should stop; called once per weight.
    """
    check = _Check(plan, (merged_in, merged_in), proven, weights, stop)
    with single_threads(num_threads, "check") as pool:
        return dict(zip(names, pool.map(check.survival, names), strict=True))


_Found = tuple[list[TensorCheck], list[str]]


class _Check:
    def __init__(
        self,
        plan: MergePlan,
        places: tuple[Path, Path],
        proven: Mapping[str, TensorCheck],
        weights: ArithmeticCheck,
        stop: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._merged_in, self._directory = places
        self._proven = proven
        self._weights = weights
        self._read = numbers_of(plan, self._merged_in)
        self._stop = stop
        self._buffers = TileBuffers(torch.device("cpu"))
        self._of_base = base_bytes_of(plan)
        parts = {stored for each in plan.requantized.values() for stored in each.names}
        self.whole = [name for name in plan.output.tensors if name not in parts]
        """Stored tensors that are there as they are elsewhere."""

    def plain(self, name: str) -> _Found:
        """Check a tensor that is there as the base has it, or as it was merged."""
        self._stop()
        of_base = name in self._of_base
        source = self._plan.base.source.directory if of_base else self._merged_in
        num_wrong = self._num_bytes_different(name, source, of_base=of_base)
        if of_base:
            same = TensorCheck(
                tensor=name, changed=False, max_abs_error=0.0, rounding_excess=0.0, num_bad_elements=num_wrong
            )
            return [same], []
        wrong = [f"tensor {name}: {num_wrong} bytes are not those that were merged"] if num_wrong else []
        return [self._proven[name]], wrong

    def requantized(self, name: str) -> _Found:
        """Check the parts of a weight that was quantized."""
        self._stop()
        plan, storage = self._plan, self._plan.storage
        assert isinstance(storage, WeightStorage)
        parts, before = plan.requantized[name], storage.before(name)
        shipped = {stored: self._shipped(stored) for stored in parts.names}
        expected = storage.quantize(name, self._read)
        wrong = [
            f"tensor {stored}: {number} elements are not what {storage.form.words} makes of the merged {name}"
            for stored in parts.names
            if (number := num_different(shipped[stored], expected[stored]))
        ]
        changed = dict.fromkeys(parts.names, self._proven[name].changed)
        if before is not None:
            changed = {stored: num_different(shipped[stored], before[stored]) > 0 for stored in parts.names}
        return checks_of_parts(parts, self._proven[name], self._remains(name, shipped), changed), wrong

    def survival(self, name: str) -> float | None:
        """Return how much of the delta would be left of a weight, were it shipped as it is quantized."""
        self._stop()
        assert isinstance(self._plan.storage, WeightStorage)
        return self._remains(name, self._plan.storage.quantize(name, self._read)).survival

    def _remains(self, name: str, shipped: Mapping[str, torch.Tensor]) -> Remains:
        """Return what is left of the delta of a weight in what ships."""
        plan, storage = self._plan, self._plan.storage
        assert isinstance(storage, WeightStorage)
        merged, was = self._read(name), plan.base.by_name.get(name)
        ships = storage.form.restore(name, plan.requantized[name], shipped, merged.dtype, transposed=False)
        merged_OI = merged.view(-1, columns_of(ships.shape))
        if was is None or not self._proven[name].targeted:
            return remains_of(ships, merged_OI, None, 1, self._buffers)
        read = functools.partial(self._weights.weight, was)
        return remains_of(ships, merged_OI, read, self._weights.row_alignment(was), self._buffers)

    def _shipped(self, stored: str) -> torch.Tensor:
        return mapped(self._directory / self._plan.output.tensors[stored][0].name, stored)

    def _num_bytes_different(self, name: str, source: Path, *, of_base: bool) -> int:
        """Return how many bytes of a tensor are others than in the place it comes from."""
        layout = self._plan.base.layout if of_base else self._plan.merged
        number = 0
        places = [(source, layout.tensors[name]), (self._directory, self._plan.output.tensors[name])]
        paths = [directory / shard.name for directory, (shard, _) in places]
        specs = [spec for _, (_, spec) in places]
        with opened(paths[0]) as one, opened(paths[1]) as other:
            for offset in range(0, specs[0].num_bytes, _PIECE_BYTES):
                pieces: list[torch.Tensor] = []
                for descriptor, path, spec in zip((one, other), paths, specs, strict=True):
                    shape = 1, min(_PIECE_BYTES, spec.num_bytes - offset)
                    piece = self._buffers.get(f"piece {len(pieces)}", torch.uint8, shape, host=True)
                    read_into(descriptor, path, piece, spec.begin + offset)
                    pieces.append(piece)
                number += num_different(*pieces)
        return number
