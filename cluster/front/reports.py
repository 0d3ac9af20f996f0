"""Parity reports of the directory that workers write them to: read from there, and from nowhere else."""

import os
import stat
from pathlib import Path

from jobs.errors import NotFoundError
from jobs.ledger.records import JobRecord
from jobs.release import REPORT_NAME, REPORT_PAGE_NAME

_MAX_BYTES = 64 * 1024**2


def read_report(record: JobRecord, reports: Path, *, page: bool) -> bytes:
    """Return the parity report of the last attempt of a job.

    Args:
        record: the job.
        reports: the directory that reports are in; what its links lead to outside of it is no report.
        page: whether the page for people is wanted, else JSON.

    Raises:
        NotFoundError: it has none, or none here.
    """
    if record.report_path is None:
        raise NotFoundError(f"job '{record.id}' has no parity report: no attempt of it came that far")
    name = REPORT_PAGE_NAME if page else REPORT_NAME
    path = Path(os.path.realpath(Path(record.report_path) / name))
    missing = NotFoundError(
        f"job '{record.id}': expected its parity report in {reports} of this machine (MERGEFLEET_REPORTS), found none; "
        "it is on the machine that merged it, and beside the release"
    )
    if not path.is_relative_to(os.path.realpath(reports)):
        raise missing
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise missing
            return file.read()
    except OSError as error:
        raise missing from error
