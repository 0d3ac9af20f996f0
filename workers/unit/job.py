"""One job on its way through a unit: what is known of it, and whose failure it is when something goes wrong."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from jobs.errors import DeviceLostError, InternalError, MergefleetError, OutOfMemoryError
from jobs.parity_report import ParitySummary, TensorCheck
from jobs.release import Artifact, Manifest, Release
from jobs.request import MergeRequest
from workers.files.local import FileState
from workers.files.shard import HashedFile
from workers.merging.outcomes import Failure, JobOutcome, MergedShards
from workers.merging.plan import MergePlan
from workers.numerics.device import is_of_memory, is_of_the_device
from workers.releases.sinks import Receipt, Staging

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A job on its way through a unit."""

    request: MergeRequest
    planned: MergePlan | None = None
    opened: Staging | None = None
    uploads: list[Future[Receipt]] = field(default_factory=list)
    """Of its finished files; several threads append."""
    bytes_put: list[int] = field(default_factory=list)
    """Of each file that has been put; several threads append."""
    receipts: list[Receipt] = field(default_factory=list)
    """Of files that were put by others, or before."""
    checks: dict[str, TensorCheck] = field(default_factory=dict)
    """The arithmetic check, by tensor."""
    wrong: list[str] = field(default_factory=list)
    """What is wrong about its shards as files, or about what was read of its adapter, a sentence each."""
    error: MergefleetError | None = None
    release: Release | None = None
    parity: ParitySummary | None = None
    notes: tuple[str, ...] = ()
    """Those of its report."""
    report_path: Path | None = None
    manifest: Manifest | None = None

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def plan(self) -> MergePlan:
        """The plan; every running job has one once the unit is prepared."""
        assert self.planned is not None
        return self.planned

    @property
    def staging(self) -> Staging:
        """Where its release is on its way; every running job has one once the unit is prepared."""
        assert self.opened is not None
        return self.opened

    @property
    def running(self) -> bool:
        """Whether it has neither failed nor found its release there already."""
        return self.error is None and self.release is None

    def ship(self, uploads: ThreadPoolExecutor, file: HashedFile | Artifact) -> None:
        """Have a finished file sent on its way, beside what goes on here."""
        artifact, state = (file.artifact, file.state) if isinstance(file, HashedFile) else (file, None)
        self.uploads.append(uploads.submit(self._put, artifact, state))

    def _put(self, artifact: Artifact, state: FileState | None) -> Receipt:
        receipt = self.staging.put(artifact, state)
        self.bytes_put.append(artifact.num_bytes)
        return receipt

    def cancel_uploads(self) -> None:
        """Give up those that have not begun."""
        for upload in self.uploads:
            upload.cancel()

    def all_put(self) -> tuple[Artifact, ...]:
        """Wait for all uploads; return the files of the release, by path."""
        artifacts = [receipt.artifact for receipt in (*self.receipts, *(upload.result() for upload in self.uploads))]
        return tuple(sorted(artifacts, key=lambda artifact: artifact.path))

    def hand_over(self) -> MergedShards:
        """Wait for all uploads, and let go of what was merged: it belongs to the worker that takes it over."""
        merged = MergedShards(
            receipts=tuple(upload.result() for upload in self.uploads),
            checks=tuple(self.checks.values()),
            wrong=tuple(self.wrong),
        )
        self.uploads.clear()
        self.checks.clear()
        self.wrong.clear()
        return merged

    def take_over(self, merged: Sequence[MergedShards]) -> None:
        """Go on with what was handed over, here or elsewhere."""
        for shards in merged:
            for receipt in shards.receipts:
                self.staging.take(receipt)
            self.receipts += shards.receipts
            self.checks |= {check.tensor: check for check in shards.checks}
            self.wrong += shards.wrong

    def drop(self) -> None:
        """Remove what it staged. A failure to do so is logged: what is left is invisible."""
        if self.opened is not None:
            try:
                self.opened.discard()
            except MergefleetError:
                # The next attempt at this destination clears it away.
                logger.warning("a staged release could not be removed", extra={"job": self.id}, exc_info=True)

    def outcome(self) -> JobOutcome:
        """Return what became of it."""
        return JobOutcome(
            job_id=self.id,
            merge_key=self.planned.merge_key if self.planned else None,
            failure=Failure.of(self.error) if self.error else None,
            release=self.release,
            parity=self.parity,
            report_path=self.report_path,
        )


def own_failure(job: Job) -> contextlib.AbstractContextManager[None]:
    """Whatever goes wrong inside is the failure of this job."""

    def fail(error: MergefleetError) -> None:
        job.error = error

    return _failures(fail)


def shared_failures(jobs: Sequence[Job]) -> contextlib.AbstractContextManager[None]:
    """Whatever goes wrong inside is the failure of all jobs that are still running."""

    def fail(error: MergefleetError) -> None:
        for job in jobs:
            if job.running:
                job.error = error

    return _failures(fail)


@contextlib.contextmanager
def _failures(fail: Callable[[MergefleetError], None]) -> Iterator[None]:
    """Turn whatever goes wrong inside into an error of ours: this is the edge of the worker."""
    try:
        yield
    except MergefleetError as error:
        fail(error)
    except Exception as error:
        if is_of_memory(error):
            fail(OutOfMemoryError(f"memory ran out: {error}; use a worker with more, or parity level 'arithmetic'"))
            return
        if is_of_the_device(error):
            first_line = next(iter(str(error).splitlines()), "")
            fail(DeviceLostError(f"the GPU failed at work: {first_line}; another worker has to do it"))
            return
        logger.exception("a fault of mergefleet, or one it does not know")
        fail(
            InternalError(f"{type(error).__name__}: {error}; a fault of mergefleet: the worker's log has the traceback")
        )
