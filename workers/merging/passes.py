"""What the lanes of a pass share: its jobs, their writers, and whose failure it is when something goes wrong."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.errors import BadInputError, MergefleetError
from jobs.parity_report import TensorCheck
from workers.files.local import FileState, file_errors
from workers.files.shard import Conveyor, HashedFile, Origin
from workers.files.writer import CheckpointWriter
from workers.merging.output import OutputTensor
from workers.merging.plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PassJob:
    """One job of a pass."""

    plan: MergePlan
    directory: Path
    """Where the merged shards are written; empty."""
    on_file: Callable[[HashedFile], None]
    """Told each file as it is closed, in a thread of the pass; an error of ours fails the job."""
    direct: bool
    """Whether its shards go past the page cache, since they are not read again here."""
    check: Callable[[], None]
    """Raises CancelledError when the job should stop; called once per tile."""


class PassState:
    """The jobs of one pass and what has been done for them; threads share it."""

    def __init__(self, jobs: Sequence[PassJob], conveyor: Conveyor, on_bytes: Callable[[int], None]) -> None:
        self.jobs = {job.plan.request.id: job for job in jobs}
        self.writers = {
            name: CheckpointWriter(
                job.directory,
                job.plan.output,
                conveyor,
                direct=job.direct,
                on_file=job.on_file,
                # What is read again would come from the disk: a clone shares no page of the cache with its origin.
                origin=_origin(job.plan) if job.direct else None,
            )
            for name, job in self.jobs.items()
        }
        self.num_base_bytes = 0
        self.num_adapter_bytes = 0
        self.num_written = 0
        self.checks: dict[str, list[TensorCheck]] = {name: [] for name in self.jobs}
        """Of the tensors that were checked on their way, by job."""
        self._on_bytes = on_bytes
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether every job has failed."""
        return all(writer.over for writer in self.writers.values())

    def well(self, names: Sequence[str]) -> list[str]:
        """Return those of some jobs that go on: they have not failed, and were not asked to stop."""
        for name in names:
            if not self.writers[name].over:
                try:
                    self.jobs[name].check()
                except MergefleetError as error:
                    self.writers[name].fail(error)
        return [name for name in names if not self.writers[name].over]

    @contextlib.contextmanager
    def job(self, name: str) -> Iterator[CheckpointWriter | None]:
        """Hand out the writer of a job that is still well; what goes wrong inside is that job's failure alone."""
        writer = self.writers[name]
        if writer.over:
            yield None
            return
        try:
            yield writer
        except MergefleetError as error:
            writer.fail(error)

    def count(self, *, base: int = 0, adapter: int = 0, written: int = 0, kept: int = 0, checked: int = 0) -> None:
        """Add to the bytes read, written or there already, and checked."""
        with self._lock:
            self.num_base_bytes += base
            self.num_adapter_bytes += adapter
            self.num_written += written
        if written or kept or checked:
            self._on_bytes(written + kept + checked)

    def checked(self, name: str, check: TensorCheck) -> None:
        """Keep what the check of a job's tensor found."""
        with self._lock:
            self.checks[name].append(check)

    def close(self) -> None:
        """Close all files, once no thread writes or hashes any more."""
        for writer in self.writers.values():
            writer.close()


def _origin(plan: MergePlan) -> Origin:
    directory = plan.base.source.directory
    names = {plan.output.tensors[name][0].name for name in plan.kept}
    with file_errors(f"reading {directory}"):
        states = {name: FileState.of((directory / name).stat()) for name in names}
    return Origin(directory, plan.kept, states)


def check_range(tensor: OutputTensor, values: torch.Tensor) -> None:
    """Check that the tensor's dtype can hold the values.

    Raises:
        BadInputError: it cannot, or there are values that are no numbers.
    """
    if values.numel() == 0:
        return
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    if not largest <= torch.finfo(tensor.dtype).max:
        raise BadInputError(
            f"tensor {tensor.name}: merging gives {largest}, which {tensor.dtype} cannot hold; request another dtype, "
            "or look for NaN and overflow in base and adapter"
        )
