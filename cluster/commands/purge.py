"""The `purge` command: what is old goes, from the ledger and from the directories of reports and logs."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.log_files import log_files, owner_of

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


def purge_logs(store: "JobStore", directory: Path, older_than_seconds: float, *, dry_run: bool) -> int:
    """Remove the log files of drivers that ended long ago, and of their workers, as far as this machine has them.

    Args:
        store: the ledger, which knows who is still at work.
        directory: of log files.
        older_than_seconds: how long ago they were last written to, at least.
        dry_run: whether nothing is to be changed.

    Returns:
        How many files there were.
    """
    limit = store.now() - older_than_seconds
    # A driver that was killed stays without an end; one that lives is seen again and again.
    alive = {each.owner for each in store.drivers() if each.ended_at is None and each.seen_at >= limit}
    written = time.time() - older_than_seconds
    old = [path for path, state in log_files(directory) if state.st_mtime < written and owner_of(path) not in alive]
    if not dry_run:
        for path in old:
            path.unlink(missing_ok=True)
    return len(old)
