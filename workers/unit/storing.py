"""Jobs whose releases are stored in a form: merged numbers are quantized, checked, and shipped."""

import functools
from collections.abc import Sequence

from workers.merging.base_plan import BasePlan
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.checks.gguf_checks import check_file, wrong_fronts
from workers.merging.checks.keeping import choose_kept
from workers.merging.checks.stored_checks import check_stored
from workers.merging.context import Context
from workers.merging.failures import own_failure
from workers.merging.gguf_storage import GgufStorage
from workers.merging.job import Job
from workers.merging.made_with import origin_of
from workers.merging.storing import store_in_form
from workers.parity.verdict import wrong_headers
from workers.unit.recording import ShardRecorder


def store(base: BasePlan, jobs: Sequence[Job], context: Context, weights: ArithmeticCheck) -> tuple[int, int]:
    """Make, check and ship the shards of releases that are stored in a form.

    Args:
        base: the planned base.
        jobs: running, their numbers merged and checked.
        context: of the unit.
        weights: of the pass, which reads what was merged into.

    Returns:
        Bytes read of the base, and bytes written.
    """
    jobs = [job for job in jobs if job.running and not job.wrong]
    if not jobs:
        return 0, 0
    tracker = context.tracker
    with tracker.timed("requantize"):
        for job in jobs:
            with own_failure(job):
                _keep(job, context, weights)
    jobs = [job for job in jobs if job.running]
    for job in jobs:
        job.witness = ShardRecorder(job, origin_of(job.plan, context.device), {})
    tracker.enter("merge", (job.id for job in jobs))
    with tracker.timed("requantize"):
        took = store_in_form(base, jobs, context)
    tracker.enter("verify", (job.id for job in jobs))
    with tracker.timed("arithmetic"):
        for job in jobs:
            if job.running:
                with own_failure(job):
                    _check(job, context, weights)
    return took


def _keep(job: Job, context: Context, weights: ArithmeticCheck) -> None:
    """Find what a job has to keep in more bits than its form has, where it asks for that."""
    job.keep(
        choose_kept(
            job.in_work,
            job.merged_in,
            job.checks,
            weights,
            num_threads=context.num_threads,
            stop=functools.partial(context.tracker.check, job.id),
        )
    )


def _check(job: Job, context: Context, weights: ArithmeticCheck) -> None:
    wrong_files, check = wrong_headers, check_stored
    if isinstance(job.in_work.storage, GgufStorage):
        wrong_files, check = wrong_fronts, check_file
    job.wrong += wrong_files(job.in_work.output, job.directory)
    if job.wrong:  # a shard that is cut short cannot be read
        return
    found = check(
        job.in_work,
        job.merged_in,
        job.directory,
        job.checks,
        weights,
        num_threads=context.num_threads,
        stop=functools.partial(context.tracker.check, job.id),
    )
    job.checks = dict(found.tensors)
    job.wrong += found.wrong
    context.tracker.advance(job.in_work.output.total_size)
    assert job.witness is not None
    job.witness.settle()
