"""How far jobs are, as their workers tell it: noted with each answer, written down all at once."""

from cluster.driving.holdings import Held, Holdings
from cluster.driving.settlement import Settlement
from jobs.ledger.records import ProgressReport
from jobs.states import STAGES, JobState
from workers.merging.outcomes import Progress

_STATE_OF_STAGE = {
    "quantize": JobState.MERGING,
    "merge": JobState.MERGING,
    "verify": JobState.VERIFYING,
    "compare": JobState.VERIFYING,
    "staged": JobState.VERIFYING,
}
"""Stages of a worker that move a job on; what follows from the others, the answers of the worker say."""


class ProgressNotes:
    """What was told since it was last written down."""

    def __init__(self, holdings: Holdings, settlement: Settlement) -> None:
        self._holdings = holdings
        self._settlement = settlement
        self._progress: dict[str, tuple[Held, ProgressReport]] = {}
        """Of each job what was told last."""

    def note(self, worker: str, progress: Progress) -> None:
        """Note how far the jobs of a unit are; each has its share of the unit's bytes."""
        leader = self._holdings.led_by(worker)
        if leader is None:
            return
        told = {held.job_id: held for held in self._holdings.at_work(leader) if held.job_id in progress.stages}
        bytes_done, bytes_total = progress.bytes_done, progress.bytes_total
        shared = self._holdings.flights[leader].shared
        if shared is not None and shared.is_open:
            shared.note_progress(worker, bytes_done)
            bytes_done, bytes_total = shared.bytes_done, shared.bytes_total
        num_jobs = len(progress.stages)
        for job_id, held in told.items():
            stage = progress.stages[job_id]
            report = ProgressReport(
                job_id=job_id,
                token=held.lease.token,
                stage=stage,
                bytes_done=bytes_done // num_jobs,
                bytes_total=bytes_total // num_jobs,
            )
            self._progress[job_id] = held, report

    def write(self) -> None:
        """Write down how far the work is that was told of since the last time: all of it at once.

        Raises:
            TransientIOError, NoCapacityError: the store cannot take it now; nothing is lost by it.
        """
        reports, self._progress = self._progress, {}
        told = {job_id: each for job_id, each in reports.items() if job_id in self._holdings.tokens}
        for state in STAGES:
            jobs = [held for held, report in told.values() if _STATE_OF_STAGE.get(report.stage) is state]
            for job_id in {held.job_id for held in jobs} - self._settlement.advance(jobs, state):
                told.pop(job_id)
        if told:
            self._settlement.note_progress(told)
