"""Having workers let go of jobs that have ended: cancelled, given back, or lost to another driver."""

from collections.abc import Sequence

from cluster.driving.holdings import Holdings
from cluster.driving.ports import Pool
from cluster.driving.scheduler import WorkerView


def drop(holdings: Holdings, pool: Pool, views: Sequence[WorkerView]) -> None:
    """Tell workers again which jobs to let go of: a worker hears it only while it is at the unit they belong to.

    Args:
        holdings: knows which worker may still be at what.
        pool: told to cancel, and to discard where the worker is at nothing.
        views: the workers as they are now.
    """
    by_name = {view.name: view for view in views}
    for worker, job_ids in list(holdings.dropped.items()):
        view = by_name.get(worker)
        if view is not None and view.up and not view.idle:
            pool.cancel(worker, sorted(job_ids))
            continue
        if view is not None and view.up:
            for job_id in sorted(job_ids):
                pool.discard(worker, job_id)
        holdings.let_go(worker, set(job_ids))
