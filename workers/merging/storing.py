"""Releases in a form: merged numbers are quantized, and all else is as it was merged, or keeps the base's bytes.

A pass has written the merged numbers to files apart, and proven them. Here a release is put together: each stored
tensor is the base's, or merged, or a part of a weight that the form's library has quantized. Memory: pieces of a few
MiB, and for each thread one weight with its codes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from workers.files.conveyor import Conveyor
from workers.files.layout import ShardLayout, TensorSpec
from workers.files.scratch import OwnedDirectory
from workers.files.tensor_io import mapped, opened, read_into
from workers.files.writer import CheckpointWriter
from workers.merging.base_plan import BasePlan
from workers.merging.context import Context
from workers.merging.gguf_storage import GgufStorage
from workers.merging.gguf_writing import tasks_of_file
from workers.merging.job import Job
from workers.merging.passes import PassState
from workers.merging.plan import MergePlan
from workers.merging.storage import WeightStorage
from workers.numerics.tiles import single_threads

_PIECE_BYTES = 4 << 20


@contextlib.contextmanager
def numbers_apart(jobs: Sequence[Job], scratch: Path) -> Iterator[list[Job]]:
    """Give jobs a place for merged numbers that are stored in a form once all are there; hand out those jobs."""
    stored = [job for job in jobs if job.merges_apart]
    try:
        for job in stored:
            job.apart = OwnedDirectory.make(scratch, "merged-")
        yield stored
    finally:
        for job in stored:
            if job.apart is not None:
                job.apart.leave()
                job.apart = None


def store_in_form(base: BasePlan, jobs: Sequence[Job], context: Context) -> tuple[int, int]:
    """Make the shards of releases that are stored in a form.

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
    if not jobs:
        return 0, 0
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
    """Return the stored tensors of a release in a form whose bytes are the base's."""
    parts = {stored for each in plan.requantized.values() for stored in each.names}
    return frozenset(plan.output.tensors.keys() - (plan.merged.tensors.keys() - in_the_base(plan)) - parts)


def in_the_base(plan: MergePlan) -> frozenset[str]:
    """Return the weights with merged numbers whose codes are the base's: what an adapter changes is fused with them."""
    assert isinstance(plan.storage, WeightStorage)
    return frozenset(plan.merged.tensors.keys() & plan.storage.in_form.keys() - plan.requantized.keys())


def numbers_of(plan: MergePlan, merged_in: Path) -> Callable[[str], torch.Tensor]:
    """Return what returns merged numbers by name, mapped.

    Args:
        plan: of the job, or the part of it in work.
        merged_in: directory of the numbers.
    """
    return lambda name: mapped(merged_in / plan.merged.tensors[name][0].name, name)


def _tasks(base: BasePlan, jobs: Sequence[Job], state: PassState) -> Iterator[Callable[[], None]]:
    """Yield what there is to do, in the order of the files, so that each is soon full."""
    for job in jobs:
        if isinstance(job.in_work.storage, GgufStorage):
            yield from tasks_of_file(job, job.in_work.storage, state)
    jobs = [job for job in jobs if not isinstance(job.in_work.storage, GgufStorage)]
    copied = {job.id: base_bytes_of(job.in_work) for job in jobs}
    for shard in base.layout.shards:
        for spec in shard.tensors:
            takers = [job for job in jobs if spec.name in copied[job.id]]
            if takers:
                yield _Copy(base.source.directory, shard, spec, takers, state, of_base=True)
    for job in jobs:
        left = in_the_base(job.in_work)
        for name, (shard, spec) in job.in_work.merged.tensors.items():
            if name in job.in_work.requantized:
                yield functools.partial(_quantize, name, job, state)
            elif name not in left:
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


def _quantize(name: str, job: Job, state: PassState) -> None:
    """Quantize one merged weight of a job."""
    plan = job.in_work
    assert isinstance(plan.storage, WeightStorage)
    if not state.well([job]):
        return
    with state.of(job) as writer:
        if writer is None:
            return
        for stored, tensor in plan.storage.quantize(name, numbers_of(plan, job.merged_in)).items():
            shard, spec = writer.locate(stored)
            shard.write_copy(spec.begin, tensor.contiguous())
            state.count(written=spec.num_bytes)
