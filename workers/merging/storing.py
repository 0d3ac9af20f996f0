"""Releases in the base's own form: merged numbers are quantized again, and all else keeps the bytes that the base has.

A pass has written the merged numbers to files apart, and proven them. Here a release is put together: each stored
tensor is the base's, or merged, or a part of a weight that the form's library has quantized. Memory: pieces of a few
MiB, and for each thread one weight with its codes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from workers.bases.forms import QuantizingForm, StoredParts
from workers.files.layout import ShardLayout, TensorSpec
from workers.files.shard import Conveyor
from workers.files.tensor_io import mapped, opened, read_into
from workers.files.writer import CheckpointWriter
from workers.merging.base_plan import BasePlan
from workers.merging.context import Context
from workers.merging.job import Job
from workers.merging.passes import PassState
from workers.merging.plan import MergePlan
from workers.numerics.tiles import single_threads

_PIECE_BYTES = 4 << 20


def store_as_base(base: BasePlan, jobs: Sequence[Job], context: Context) -> tuple[int, int]:
    """Make the shards of releases in the base's form.

    A job that went well has its files; the others have their errors.

    Args:
        base: the planned base.
        jobs: their merged numbers are written, and nothing of what is written here.
        context: of the unit.

    Returns:
        Bytes read of the base, and bytes written.

    Raises:
        NotFoundError, BadInputError, TransientIOError: the base itself cannot be read.
    """
    conveyor = Conveyor.of_threads(context.num_threads)
    writers = {
        job.id: CheckpointWriter(job.directory, job.in_work.output, conveyor, direct=False, on_file=job.ship)
        for job in jobs
    }
    state = PassState(jobs, writers, context.tracker)
    try:
        with single_threads(context.num_threads, "store") as pool:
            for done in [pool.submit(task) for task in _tasks(base, jobs, state)]:
                done.result()
        conveyor.close()
        state.settle()
        return state.num_base_bytes, state.num_written
    finally:
        conveyor.close()
        state.close()


def base_bytes_of(plan: MergePlan) -> frozenset[str]:
    """Return the stored tensors of a release in the base's form whose bytes are the base's."""
    parts = {stored for each in plan.requantized.values() for stored in each.names}
    return frozenset(plan.output.tensors.keys() - plan.merged.tensors.keys() - parts)


def parts_of(base: BasePlan, parts: StoredParts) -> dict[str, torch.Tensor]:
    """Return what a weight of the base is stored as, by name: views of mapped files."""
    directory = base.source.directory
    return {name: mapped(directory / base.layout.tensors[name][0].name, name) for name in parts.names}


def _tasks(base: BasePlan, jobs: Sequence[Job], state: PassState) -> Iterator[Callable[[], None]]:
    """Yield what there is to do, in the order of the base's files, so that each is soon full."""
    copied = {job.id: base_bytes_of(job.in_work) for job in jobs}
    owners = {parts.codes: name for name, parts in base.in_form.items()}
    for shard in base.layout.shards:
        for spec in shard.tensors:
            takers = [job for job in jobs if spec.name in copied[job.id]]
            if takers:
                yield _Copy(base.source.directory, shard, spec, takers, state, of_base=True)
            for job in jobs:
                if owners.get(spec.name) in job.in_work.requantized:
                    yield _Quantize(base, owners[spec.name], job, state)
    for job in jobs:
        for name, (shard, spec) in job.in_work.merged.tensors.items():
            if name not in job.in_work.requantized:
                yield _Copy(job.merged_in, shard, spec, [job], state, of_base=False)


class _Copy:
    """Copies one tensor of a checkpoint into releases; it is read once."""

    def __init__(
        self,
        directory: Path,
        shard: ShardLayout,
        spec: TensorSpec,
        takers: Sequence[Job],
        state: PassState,
        *,
        of_base: bool,
    ) -> None:
        self._path = directory / shard.name
        self._spec = spec
        self._takers = takers
        self._state = state
        self._of_base = of_base

    def __call__(self) -> None:
        name, begin, num_bytes = self._spec.name, self._spec.begin, self._spec.num_bytes
        for job in self._takers:
            with self._state.of(job) as writer:
                if writer is not None:
                    writer.locate(name)  # a tensor without elements has a place, too
        with opened(self._path) as descriptor:
            for offset in range(0, num_bytes, _PIECE_BYTES):
                takers = self._state.well(self._takers)
                if not takers:
                    return
                piece = torch.empty(min(_PIECE_BYTES, num_bytes - offset), dtype=torch.uint8)
                read_into(descriptor, self._path, piece, begin + offset)
                self._state.count(base=len(piece) if self._of_base else 0)
                for job in takers:
                    with self._state.of(job) as writer:
                        if writer is not None:
                            shard, spec = writer.locate(name)
                            shard.write_copy(spec.begin + offset, piece)
                            self._state.count(written=len(piece))


class _Quantize:
    """Quantizes one merged weight of a job again."""

    def __init__(self, base: BasePlan, name: str, job: Job, state: PassState) -> None:
        self._base = base
        self._name = name
        self._job = job
        self._state = state

    def __call__(self) -> None:
        plan = self._job.in_work
        if not self._state.well([self._job]):
            return
        parts = plan.requantized[self._name]
        stored = parts_of(self._base, parts)
        self._state.count(base=sum(tensor.numel() * tensor.dtype.itemsize for tensor in stored.values()))
        with self._state.of(self._job) as writer:
            if writer is None:
                return
            weight = mapped(self._job.merged_in / plan.merged.tensors[self._name][0].name, self._name)
            for name, tensor in quantized(self._base, self._name, parts, stored, weight).items():
                shard, spec = writer.locate(name)
                shard.write_copy(spec.begin, tensor.contiguous())
                self._state.count(written=spec.num_bytes)


def quantized(
    base: BasePlan, name: str, parts: StoredParts, stored: dict[str, torch.Tensor], weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return a weight as the form's library quantizes it, by stored name, as it is laid out."""
    assert isinstance(base.form, QuantizingForm)
    specs = {each: spec for each, (_, spec) in base.layout.tensors.items()}
    layout = base.form.requantized(name, parts, specs)
    found = base.form.quantize(name, parts, stored, weight)
    return {each: found[each].to(dtype).reshape(shape) for each, (dtype, shape) in layout.items()}
