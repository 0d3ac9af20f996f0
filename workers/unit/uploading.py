"""The threads that ship the finished files of a unit's jobs."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from workers.merging.job import Job

_NUM_UPLOADS = 2
"""Files shipped at the same time by one worker."""


@contextlib.contextmanager
def uploading(jobs: Sequence[Job]) -> Iterator[None]:
    """Ship the files that jobs finish inside, and wait for them at the end; those of a job that failed are given up."""
    with ThreadPoolExecutor(_NUM_UPLOADS, thread_name_prefix="upload") as carriers:
        for job in jobs:
            job.carriers = carriers
        try:
            yield
        except BaseException:
            for job in jobs:
                job.cancel_uploads()
            raise
        for job in jobs:
            if not job.running:
                job.cancel_uploads()
