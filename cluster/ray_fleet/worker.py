"""The worker as an actor: it writes a log file, in which each line names what it is at."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

from cluster.log_files import start_log, worker_log
from cluster.logs import quiet_libraries
from workers.files.collector import loading
from workers.merging.outcomes import Readiness
from workers.merging.settings import WorkerSettings

with loading():  # first thing in an actor's process
    import workers.worker
    from workers.unit.leftovers import keep_clear

_ENDED = frozenset({"failed", "published"})


class MergeWorker(workers.worker.MergeWorker):
    """A worker in a process of its own, which has its place's name in Ray."""

    def __init__(self, logs: Path, owner: str, settings: WorkerSettings) -> None:
        """Begin its log, then be a worker.

        Args:
            logs: directory of log files.
            owner: the driver it works for.
            settings: as of every worker.
        """
        import ray  # noqa: PLC0415 - see `session.py`

        quiet_libraries()
        self._log = worker_log(ray.get_runtime_context().get_actor_name() or "worker", socket.gethostname(), owner)
        file = start_log(logs, self._log)
        super().__init__(settings)
        keep_clear(settings.scratch)
        file.beside = self._at_work

    def ready(self) -> Readiness:
        """Say whether this worker can use its device, and where it logs."""
        return dataclasses.replace(super().ready(), log=self._log)

    def _at_work(self) -> dict[str, Any]:
        """Return the unit in work, and those of its jobs that have not come to an end."""
        progress = self.progress()
        ids = [job_id for job_id, stage in progress.stages.items() if stage not in _ENDED]
        return {"unit": progress.unit, "job_ids": ids} if ids else {}
