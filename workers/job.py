"""One job on its way through a unit: what is known of it, and whose failure it is when something goes wrong."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from jobs.errors import InternalError, MergefleetError, OutOfMemoryError
from jobs.release import Artifact, Manifest, ParitySummary, Release
from jobs.request import MergeRequest
from workers.outcomes import Failure, JobOutcome
from workers.plan import MergePlan
from workers.sinks import Staging
from workers.writer import HashedFile

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A job on its way through a unit."""

    request: MergeRequest
    planned: MergePlan | None = None
    opened: Staging | None = None
    shipped: list[tuple[Artifact, Future[None]]] = field(default_factory=list)
    """Its finished files, each with its upload; several threads append."""
    error: MergefleetError | None = None
    release: Release | None = None
    parity: ParitySummary | None = None
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
        self.shipped.append((artifact, uploads.submit(self.staging.put, artifact, state)))

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
    except (MemoryError, torch.OutOfMemoryError) as error:
        fail(OutOfMemoryError(f"memory ran out: {error}; use a worker with more, or parity level 'arithmetic'"))
    except Exception as error:
        logger.exception("a fault of mergefleet, or one it does not know")
        fail(
            InternalError(f"{type(error).__name__}: {error}; a fault of mergefleet: the worker's log has the traceback")
        )
