"""Whose failure it is when something goes wrong: that of one job, or of all that share what failed."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from jobs.errors import DeviceLostError, InternalError, MergefleetError, OutOfMemoryError
from workers.files.local import is_of_the_place, translate_os_error
from workers.merging.job import Job
from workers.numerics.device import is_of_memory, is_of_the_device

logger = logging.getLogger(__name__)


def own_failure(job: Job) -> contextlib.AbstractContextManager[None]:
    """An error inside is the failure of this job."""

    def fail(error: MergefleetError) -> None:
        job.error = error

    return _failures(fail)


def shared_failures(jobs: Sequence[Job]) -> contextlib.AbstractContextManager[None]:
    """An error inside is the failure of all jobs that are still running."""

    def fail(error: MergefleetError) -> None:
        for job in jobs:
            if job.running:
                job.error = error

    return _failures(fail)


@contextlib.contextmanager
def _failures(fail: Callable[[MergefleetError], None]) -> Iterator[None]:
    """Turn every error inside into one of ours: this is the edge of the worker."""
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
        if isinstance(error, OSError) and is_of_the_place(error):
            fail(translate_os_error(error, "at work"))
            return
        logger.exception("a fault of mergefleet, or one it does not know")
        fail(
            InternalError(f"{type(error).__name__}: {error}; a fault of mergefleet: the worker's log has the traceback")
        )
