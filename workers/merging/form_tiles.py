"""Weights that are stored in a form as they are merged: rows are quantized, checked and written while they are at hand.

That is done where scales reach no further than a tile, which is stored as if it were a weight of its own. What else
is stored in a form waits until all of its numbers are there (`storing.py`).
"""

import threading
from collections.abc import Mapping

import torch

from jobs.errors import ParityFailedError
from jobs.parity_report import TensorCheck
from workers.bases.forms import StoredParts
from workers.files.writer import CheckpointWriter
from workers.merging.checks.remaining import Remains, checks_of_parts, remains_of
from workers.merging.plan import MergePlan
from workers.merging.storage import GivenStorage
from workers.numerics.kernels.differences import num_different
from workers.numerics.tiles import TileBuffers


class FormedWeight:
    """One weight of one job on its way into its form; several threads bring rows of it."""

    def __init__(self, plan: MergePlan, name: str, buffers: TileBuffers, *, checked: bool) -> None:
        """Start without rows.

        Args:
            plan: of the job, or the part of it in work.
            name: of the weight.
            buffers: memory of each thread.
            checked: whether what is made is looked at once more.
        """
        assert isinstance(plan.storage, GivenStorage)
        self._storage = plan.storage
        self._name = name
        self._parts = plan.requantized[name]
        self._buffers = buffers
        self._checked = checked
        self._left: dict[int, Remains] = {}
        """By the row they begin at."""
        self._beside: dict[int, Mapping[str, torch.Tensor]] = {}
        """What goes with the codes, small enough to be written at once, by the row it begins at."""
        self._lock = threading.Lock()

    def put(
        self, writer: CheckpointWriter, rows: slice, merged_OI: torch.Tensor, before_OI: torch.Tensor | None
    ) -> int:
        """Quantize rows and have their codes written.

        Args:
            writer: of the release.
            rows: a tile of the weight.
            merged_OI: their numbers, on the CPU.
            before_OI: these rows of W; None where nothing was added to them.

        Returns:
            Bytes written.

        Raises:
            ParityFailedError: they did not become what they have to be.
        """
        shape = len(merged_OI), merged_OI.shape[1]
        parts, layout = self._storage.output.parts(self._name, shape)
        shard, spec = writer.locate(parts.codes)
        offset = spec.begin + rows.start * spec.row_bytes
        dtype, codes_shape = layout[parts.codes]
        num_bytes = shape[0] * spec.row_bytes
        with shard.buffer(offset, num_bytes) as buffer:
            codes = buffer.view(dtype, codes_shape)
            made = self._storage.output.quantize(self._name, merged_OI, [], codes)
            if self._checked:
                left = self._look_at(parts, made, merged_OI, before_OI)
                with self._lock:
                    self._left[rows.start] = left
            shard.write(offset, buffer)
        with self._lock:
            self._beside[rows.start] = {stored: made[stored] for stored in parts.beside.values()}
        return num_bytes

    def finish(self, writer: CheckpointWriter) -> int:
        """Have what goes with the codes written, once all rows are there; return its bytes."""
        assert self._parts.shape is not None
        pieces = [self._beside[start] for start in sorted(self._beside)]
        num_bytes = 0
        for stored, tensor in self._storage.output.joined(self._name, self._parts.shape, pieces).items():
            shard, spec = writer.locate(stored)
            shard.write_copy(spec.begin, tensor)
            num_bytes += spec.num_bytes
        return num_bytes

    def checks(self, proven: TensorCheck) -> list[TensorCheck]:
        """Return what a report says of its parts.

        Args:
            proven: what was found about its merged numbers.
        """
        left = Remains.total(self._left[start] for start in sorted(self._left))
        return checks_of_parts(self._parts, proven, left, dict.fromkeys(self._parts.names, proven.changed))

    def _look_at(
        self,
        parts: StoredParts,
        made: Mapping[str, torch.Tensor],
        merged_OI: torch.Tensor,
        before_OI: torch.Tensor | None,
    ) -> Remains:
        """Compare the memory that is written with what the rows have to become; return what is left of their delta."""
        codes = made[parts.codes]
        again = self._buffers.get("codes again", codes.dtype, (codes.shape[0], codes.shape[1]), host=True)
        expected = self._storage.output.quantize(self._name, merged_OI, [], again)
        for stored, tensor in made.items():
            if number := num_different(tensor, expected[stored]):
                raise ParityFailedError(
                    f"tensor {stored}: {number} elements are not what {self._storage.output.words} makes of the merged "
                    f"{self._name}; nothing was published"
                )
        ships = self._storage.form.restore(self._name, parts, made, merged_OI.dtype, transposed=False)
        before = None if before_OI is None else before_OI.__getitem__
        return remains_of(ships, merged_OI, before, 1, self._buffers)
