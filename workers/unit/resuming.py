"""Shards that dead attempts at a release have finished: looked at again, and taken over where nothing has changed."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from workers.files.layout import ShardLayout
from workers.merging.checks.judgement import failures
from workers.merging.context import Context
from workers.merging.failures import own_failure
from workers.merging.job import Job
from workers.merging.made_with import origin_of
from workers.merging.outcomes import MergedShards
from workers.merging.pieces import pieces_of
from workers.merging.wider import keeping
from workers.releases.records import ShardRecord
from workers.releases.sinks import Receipt

logger = logging.getLogger(__name__)


def resume_all(jobs: Sequence[Job], context: Context) -> None:
    """Take over what dead attempts have finished of jobs; each fails alone."""
    with context.tracker.timed("resume"):
        for job in jobs:
            with own_failure(job), job.shipping():
                resume(job, origin_of(job.plan, context.device), context)


def resume(job: Job, origin: str, context: Context) -> None:
    """Take over what a dead attempt has finished of a job; what is left becomes its part in work.

    A shard is taken over with all others of its piece, or not at all.

    Args:
        job: planned, its staging open, nothing merged.
        origin: as `workers.merging.made_with.origin_of` tells it.
        context: of the unit.

    Raises:
        TransientIOError, AuthError, NoCapacityError, CancelledError: by kind of fault.
    """
    records, tracker = job.staging.records, context.tracker
    found = records.left()
    if not found:
        return
    tracker.enter("resume", [job.id])
    # What is kept in more bits decides the layout of the shards; of a piece all is known, or it is not taken over.
    kept = tuple(each for record in found for each in record.kept if each.weight in job.plan.merged.tensors)
    shards = {shard.name: shard for shard in keeping(job.plan, kept).output.shards}
    left = {record.artifact.path: record for record in found if _fits(record, shards, job, origin)}
    pieces = [piece for piece in _of_output(job) if left.keys() >= set(piece)]
    names = [name for shards in pieces for name in shards]

    def claim(name: str) -> Receipt | None:
        tracker.check(job.id)
        return records.claim(left[name], whole=job.is_run)

    with ThreadPoolExecutor(context.num_threads, thread_name_prefix="resume") as pool:
        receipts = dict(zip(names, pool.map(claim, names), strict=True))
    taken = [name for shards in pieces if all(receipts[name] for name in shards) for name in shards]
    records.clear(besides=taken)
    if not taken:
        return
    job.resumed = MergedShards(
        receipts=tuple(receipt for name in taken if (receipt := receipts[name])),
        checks=tuple(check for name in taken for check in left[name].checks),
        wrong=(),
        kept=tuple(each for name in taken for each in left[name].kept),
    )
    job.keep(job.resumed.kept)
    job.part = job.plan.part({shard.name for shard in job.plan.output.shards}.difference(taken))
    num_bytes = sum(left[name].artifact.num_bytes for name in taken)
    tracker.advance(2 * num_bytes)  # merged and checked
    logger.info("finished shards are used again", extra={"job": job.id, "shards": len(taken), "num_bytes": num_bytes})


def _of_output(job: Job) -> list[tuple[str, ...]]:
    """Return the shards of each piece that a release has; merged numbers that lie apart may have names of their own."""
    names = {shard.name for shard in job.plan.output.shards}
    return [tuple(name for name in piece.shards if name in names) for piece in pieces_of([job.plan])]


def _fits(record: ShardRecord, shards: Mapping[str, ShardLayout], job: Job, origin: str) -> bool:
    """Whether a record is of a shard of this job's plan, made in the same way, and of one that is right."""
    shard = shards.get(record.artifact.path)
    return (
        shard is not None
        and record.origin == origin
        and record.artifact.num_bytes == shard.num_bytes
        and sorted(check.tensor for check in record.checks) == sorted(spec.name for spec in shard.tensors)
        and not failures(record.checks, job.request.parity.thresholds.max_rounding_excess)
    )
