"""The `purge` command: what is old goes, from the ledger and from the directory of reports."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.ledger.store import JobStore


def purge_jobs(store: "JobStore", older_than_seconds: float, *, dry_run: bool) -> tuple[int, int]:
    """Forget jobs that ended long ago, and remove their reports.

    Args:
        store: the ledger.
        older_than_seconds: how long ago they ended, at least.
        dry_run: whether nothing is to be changed.

    Returns:
        How many jobs and reports there were.
    """
    ids, report_paths = store.purge(older_than_seconds, dry_run=dry_run)
    reports = [path for path in map(Path, report_paths) if path.is_dir()]
    if not dry_run:
        for path in reports:
            shutil.rmtree(path, ignore_errors=True)
    return len(ids), len(reports)
