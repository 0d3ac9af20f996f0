"""The same adapters merged into the base in its other weights, so that a person can choose: `compare` of a request.

Both merged checkpoints are asked by the same two references, base + adapter in 16 bits and in 4. What is made here is
compared and dropped; nothing of it is published (docs/decisions/0010-comparison.md).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.errors import BadInputError, MergefleetError, ParityFailedError
from jobs.parity_report import Alternative, BehaviourCheck
from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from workers.files.scratch import OwnedDirectory
from workers.merging.base_plan import plan_base
from workers.merging.context import Context
from workers.merging.job import Job
from workers.merging.merge import run_pass
from workers.merging.module_weights import module_weights
from workers.merging.plan import plan_merge
from workers.merging.sidecars import write_sidecars
from workers.merging.storing import numbers_apart, store_in_form
from workers.parity.asking import Subject
from workers.parity.behaviour import check_behaviour
from workers.parity.references import references


def other_way(request: MergeRequest) -> MergeRequest:
    """Return the request for the base in its other weights: 16-bit instead of 4-bit, NF4 instead of 16-bit."""
    plain = not request.base_quantization.converts
    return request.model_copy(
        update={
            "base_quantization": BaseQuantization.NF4 if plain else BaseQuantization.NONE,
            "quantization_options": QuantizationOptions(),
            "max_shard_size": None,
        }
    )


def compare_ways(jobs: Sequence[Job], context: Context) -> list[Alternative | MergefleetError]:
    """Merge jobs of one pass into their base in its other weights, and ask what comes out.

    Args:
        jobs: planned; their base is not stored in 4-bit.
        context: its scratch holds the checkpoints that are compared, and is emptied again.

    Returns:
        For each job, what was found, or the error that its comparison failed with.

    Raises:
        CancelledError: all jobs were.
        NoCapacityError: scratch is full.
    """
    source = jobs[0].plan.base.source
    room = OwnedDirectory.make(context.scratch, "compared-")
    try:
        others = _merge(jobs, room.path, context)
        merged = [other for other in others if other.error is None]
        answers: dict[str, tuple[BehaviourCheck, ...] | MergefleetError] = {}
        if merged:
            # The two references of the release, from the other side: what informed there is this merge's own here.
            beside = [
                dataclasses.replace(reference, gates=not reference.gates)
                for reference in reversed(references(source.directory, jobs[0].request))
            ]
            answers = check_behaviour(
                source.directory,
                [Subject.of(other, context.device) for other in merged],
                context.device,
                room.path,
                cancelled=functools.partial(context.tracker.check_all, [job.id for job in jobs]),
                beside=beside,
            )
            context.tracker.advance(sum(job.plan.output.total_size for job in jobs if job.id in answers))
        quantization = others[0].request.base_quantization
        return [other.error or _outcome(answers[other.id], quantization) for other in others]
    finally:
        room.leave()


def _outcome(
    answer: tuple[BehaviourCheck, ...] | MergefleetError, quantization: BaseQuantization
) -> Alternative | MergefleetError:
    if isinstance(answer, ParityFailedError):
        # Not the release's: that one has passed.
        return BadInputError(f"the merge that is made for comparison alone does not run, leave out compare: {answer}")
    if isinstance(answer, MergefleetError):
        return answer
    return Alternative(base_quantization=quantization, behaviour=answer)


def _merge(jobs: Sequence[Job], room: Path, context: Context) -> list[Job]:
    """Merge into the other weights; what they take on the device is free again when this returns."""
    ids = [job.id for job in jobs]

    def check_all(_: int) -> None:
        context.tracker.check_all(ids)

    others = [Job(other_way(job.request), compared_in=room / str(number)) for number, job in enumerate(jobs)]
    base = plan_base(jobs[0].plan.base.source, others[0].request)
    for job, other in zip(jobs, others, strict=True):
        with _of_one(other):
            other.planned = plan_merge(base, other.request, job.plan.adapter, job.plan.opened.inert_fields)
            other.keep(job.plan.kept_weights)  # stored as the release is, or it would be compared for that, too
            other.directory.mkdir()
    planned = [other for other in others if other.running]
    if not planned:
        return others
    quantized = None
    if base.quantization is not None:
        quantized = context.cache.open(base.quantization, check_all)
        quantized.hold(whole=False)  # each weight is used once
    with numbers_apart(planned, context.scratch) as in_form:
        with module_weights(base, quantized, [other.plan for other in planned], context.scratch, check_all) as weights:
            run_pass(base, quantized, weights, planned, context, check=None)
        store_in_form(base, [other for other in in_form if other.running], context)
    for other in planned:
        if other.running:
            with _of_one(other):
                write_sidecars(other.plan, other.directory)
    return others


@contextlib.contextmanager
def _of_one(other: Job) -> Iterator[None]:
    """An error inside is that of one comparison; a fault is that of all."""
    try:
        yield
    except MergefleetError as error:
        other.error = error
