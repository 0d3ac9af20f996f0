"""What the lanes of a pass share: its jobs, their writers, and whose failure it is when something goes wrong."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from jobs.errors import BadInputError, MergefleetError
from jobs.parity_report import TensorCheck
from workers.files.writer import CheckpointWriter
from workers.merging.job import Job
from workers.merging.output import OutputTensor
from workers.merging.tracker import Tracker
from workers.merging.work import WeightInWork


class PassState:
    """The jobs of one pass and what has been done for them; threads share it."""

    def __init__(self, jobs: Sequence[Job], writers: Mapping[str, CheckpointWriter], tracker: Tracker) -> None:
        """Start with nothing done.

        Args:
            jobs: of the pass.
            writers: of their shards, by job.
            tracker: of the unit.
        """
        self.jobs = tuple(jobs)
        self._witnesses = {job.id: job.witness for job in jobs}
        self.writers = writers
        self.num_base_bytes = 0
        self.num_adapter_bytes = 0
        self.num_written = 0
        self._checks: dict[str, dict[str, TensorCheck]] = {job.id: {} for job in jobs}
        self._tracker = tracker
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether every job has failed."""
        return all(writer.over for writer in self.writers.values())

    def well(self, jobs: Sequence[Job]) -> list[Job]:
        """Return those of some jobs that go on: they have not failed, and were not asked to stop."""
        for job in jobs:
            if not self.writers[job.id].over:
                try:
                    self._tracker.check(job.id)
                except MergefleetError as error:
                    self.writers[job.id].fail(error)
        return [job for job in jobs if not self.writers[job.id].over]

    @contextlib.contextmanager
    def of(self, job: Job) -> Iterator[CheckpointWriter | None]:
        """Hand out the writer of a job that is still well; what goes wrong inside is that job's failure alone."""
        writer = self.writers[job.id]
        if writer.over:
            yield None
            return
        try:
            yield writer
        except MergefleetError as error:
            writer.fail(error)

    @contextlib.contextmanager
    def of_all(self, jobs: Sequence[Job]) -> Iterator[None]:
        """What goes wrong inside is the failure of all of some jobs."""
        try:
            yield
        except MergefleetError as error:
            for job in jobs:
                self.writers[job.id].fail(error)

    def count(self, *, base: int = 0, adapter: int = 0, written: int = 0, kept: int = 0, checked: int = 0) -> None:
        """Add to the bytes read, written or there already, and checked."""
        with self._lock:
            self.num_base_bytes += base
            self.num_adapter_bytes += adapter
            self.num_written += written
        if written or kept or checked:
            self._tracker.advance(written + kept + checked)

    def checked(self, job_id: str, check: TensorCheck) -> None:
        """Keep what the check of a job's tensor found."""
        with self._lock:
            self._checks[job_id][check.tensor] = check
        if (witness := self._witnesses[job_id]) is not None:
            witness.checked(check)

    def end_tile(self, weight: WeightInWork, quantization_errors: Mapping[str, float]) -> None:
        """Count one tile of a weight less; with the last one, keep what was found and let go of what was loaded.

        Args:
            weight: in work.
            quantization_errors: what 4 bits changed of W, by tensor.
        """
        with weight.lock:
            weight.num_tiles_left -= 1
            if weight.num_tiles_left:
                return
        weight.operands.clear()
        for job in self.jobs:
            tally, formed = weight.tallies.get((job.leader or job).id), weight.formed.pop(job.id, None)
            with self.of(job) as writer:
                if writer is None:
                    continue
                if formed is not None:
                    num_bytes = formed.finish(writer)
                    self.count(written=num_bytes, checked=0 if tally is None else num_bytes)
                if tally is not None:
                    found = tally.summary()
                    of_4_bits = {"quantization_error": quantization_errors.get(found.tensor)}
                    checks = [found] if formed is None else formed.checks(found.model_copy(update=of_4_bits))
                    for check in checks:
                        self.checked(job.id, check)
        weight.tallies.clear()

    def settle(self) -> None:
        """Give each job what came of it, once all is written and hashed."""
        for job in self.jobs:
            writer = self.writers[job.id]
            files = writer.finished()
            job.error = writer.error
            job.files = files if writer.error is None else ()
            job.checks |= self._checks[job.id]

    def close(self) -> None:
        """Close all files, once no thread writes or hashes any more."""
        for writer in self.writers.values():
            writer.close()


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
