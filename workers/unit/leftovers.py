"""What dead processes left in a worker's scratch directory: swept, but for finished shards that are still of use."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.locations import LocalPath
from workers.files.local import file_errors
from workers.files.scratch import sweep
from workers.merging.job import Job
from workers.releases.sinks.local_records import RECORDS_DIRECTORY, has_records

_KEPT_SECONDS = 24 * 3600.0
"""How long finished shards wait for the next attempt at their release."""


def sweep_scratch(scratch: Path) -> None:
    """Sweep a scratch directory; finished shards of the last day stay."""
    oldest = time.time() - _KEPT_SECONDS

    def spare(directory: Path) -> bool:
        return has_records(directory) and (directory / RECORDS_DIRECTORY).stat().st_mtime >= oldest

    sweep(scratch, spare=spare)


def make_room(scratch: Path, jobs: Sequence[Job]) -> None:
    """Sweep finished shards of others, too, where the disk has no room for what some jobs write there."""
    needed = sum(job.in_work.output.total_size for job in jobs if not isinstance(job.request.destination, LocalPath))
    if not needed:
        return
    with file_errors(f"making room in {scratch}", scratch):
        if shutil.disk_usage(scratch).free < needed:
            sweep(scratch)
