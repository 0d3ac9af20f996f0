"""What dead processes left in a worker's scratch directory, or by way of it: finished shards stay while of use."""

import logging
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.locations import LocalPath
from workers.files.local import file_errors
from workers.files.scratch import sweep
from workers.merging.job import Job
from workers.merging.wider import most_bytes
from workers.releases.sinks.local_records import RECORDS_DIRECTORY, has_records
from workers.releases.trails import follow_trails

_KEPT_SECONDS = 24 * 3600.0
"""How long finished shards wait here for the next attempt at their release."""
_LOOK_SECONDS = 10.0
_log = logging.getLogger(__name__)


def sweep_scratch(scratch: Path) -> None:
    """Sweep a scratch directory; finished shards of the last day stay."""
    oldest = time.time() - _KEPT_SECONDS

    def spare(directory: Path) -> bool:
        return has_records(directory) and (directory / RECORDS_DIRECTORY).stat().st_mtime >= oldest

    sweep(scratch, spare=spare)


def make_room(scratch: Path, jobs: Sequence[Job]) -> None:
    """Sweep finished shards of others, too, where the disk has no room for what some jobs write there."""
    needed = sum(most_bytes(job.in_work) for job in jobs if not isinstance(job.request.destination, LocalPath))
    if not needed:
        return
    with file_errors(f"making room in {scratch}", scratch):
        if shutil.disk_usage(scratch).free < needed:
            sweep(scratch)


def keep_clear(scratch: Path) -> None:
    """Follow the trails of dead attempts from now on, in a thread that ends with this process.

    In a thread of its own, so that no job waits for a place that does not answer.
    """

    def follow() -> None:
        while True:
            try:
                follow_trails(scratch)
            except OSError:
                _log.warning("what dead attempts left could not be looked at", exc_info=True)
            time.sleep(_LOOK_SECONDS)

    threading.Thread(target=follow, name="leftovers", daemon=True).start()
