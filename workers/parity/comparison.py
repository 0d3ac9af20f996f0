"""The same adapters merged into the base in its other weights, so that a person can choose: `compare` of a request.

Both merged checkpoints are asked by the same two references, base + adapter in 16 bits and in 4. What is made here is
compared and dropped; nothing of it is published (docs/decisions/0010-comparison.md).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from jobs.errors import BadInputError, MergefleetError, ParityFailedError
from jobs.parity_report import Alternative, BehaviourCheck
from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from workers.bases.quantized_cache import QuantizedCache
from workers.files.scratch import OwnedDirectory
from workers.merging.base_plan import plan_base
from workers.merging.merge import run_pass
from workers.merging.module_weights import module_weights
from workers.merging.passes import PassJob
from workers.merging.plan import MergePlan, plan_merge
from workers.merging.sidecars import write_sidecars
from workers.parity.asking import Subject
from workers.parity.behaviour import check_behaviour
from workers.parity.references import references


def other_way(request: MergeRequest) -> MergeRequest:
    """Return the request for the base in its other weights: 16-bit instead of 4-bit, NF4 instead of 16-bit."""
    plain = request.base_quantization is BaseQuantization.NONE
    return request.model_copy(
        update={
            "base_quantization": BaseQuantization.NF4 if plain else BaseQuantization.NONE,
            "quantization_options": QuantizationOptions(),
            "max_shard_size": None,
        }
    )


def compare_ways(
    plans: Sequence[MergePlan],
    *,
    cache: QuantizedCache,
    scratch: Path,
    device: torch.device,
    num_threads: int,
    on_bytes: Callable[[int], None],
    cancelled: Callable[[], None],
) -> dict[str, Alternative | MergefleetError]:
    """Merge jobs of one pass into their base in its other weights, and ask what comes out.

    Args:
        plans: of the jobs; their base is not stored in 4-bit.
        cache: of quantized bases.
        scratch: existing directory for the checkpoints that are compared; emptied again.
        device: where tiles are computed and models run.
        num_threads: threads that compute.
        on_bytes: told the bytes written, and as many again when they are asked.
        cancelled: raises CancelledError when the work should stop.

    Returns:
        By request id, what was found, or the error that this job's comparison failed with.

    Raises:
        CancelledError: by `cancelled`.
        NoCapacityError: scratch is full.
    """
    source = plans[0].base.source
    found: dict[str, Alternative | MergefleetError] = {}
    room = OwnedDirectory.make(scratch, "compared-")
    try:
        subjects = []
        merges = _merge(
            plans,
            room.path,
            scratch=scratch,
            cache=cache,
            device=device,
            num_threads=num_threads,
            on_bytes=on_bytes,
            cancelled=cancelled,
        )
        for name, merged in merges.items():
            if isinstance(merged, MergefleetError):
                found[name] = merged
            else:
                subjects.append(merged)
        if subjects:
            # The two references of the release, from the other side: what informed there is this merge's own here.
            beside = [
                dataclasses.replace(reference, gates=not reference.gates)
                for reference in reversed(references(source.directory, plans[0].request))
            ]
            answers = check_behaviour(source.directory, subjects, device, room.path, cancelled=cancelled, beside=beside)
            on_bytes(sum(plan.output.total_size for plan in plans if plan.request.id in answers))
            for name, answer in answers.items():
                found[name] = _outcome(answer, subjects[0].request.base_quantization)
    finally:
        room.leave()
    return found


def _outcome(
    answer: tuple[BehaviourCheck, ...] | MergefleetError, quantization: BaseQuantization
) -> Alternative | MergefleetError:
    if isinstance(answer, ParityFailedError):
        # Not the release's: that one has passed.
        return BadInputError(f"the merge that is made for comparison alone does not run, leave out compare: {answer}")
    if isinstance(answer, MergefleetError):
        return answer
    return Alternative(base_quantization=quantization, behaviour=answer)


def _merge(
    plans: Sequence[MergePlan],
    room: Path,
    *,
    scratch: Path,
    cache: QuantizedCache,
    device: torch.device,
    num_threads: int,
    on_bytes: Callable[[int], None],
    cancelled: Callable[[], None],
) -> dict[str, Subject | MergefleetError]:
    """Merge into the other weights; what they take on the device is free again when this returns."""
    merged: dict[str, Subject | MergefleetError] = {}
    base = plan_base(plans[0].base.source, other_way(plans[0].request))
    others: list[MergePlan] = []
    for plan in plans:
        try:
            others.append(plan_merge(base, other_way(plan.request), plan.adapter, plan.opened.inert_fields))
        except MergefleetError as error:
            merged[plan.request.id] = error
    if not others:
        return merged
    quantized = None
    if base.quantization is not None:
        quantized = cache.open(base.quantization, lambda _: cancelled())
        quantized.hold(whole=False)  # each weight is used once
    jobs = [
        PassJob(plan=plan, directory=room / str(number), on_file=lambda _: None, direct=False, check=cancelled)
        for number, plan in enumerate(others)
    ]
    for job in jobs:
        job.directory.mkdir()
    with module_weights(base, quantized, others, scratch, lambda _: cancelled()) as weights:
        result = run_pass(
            base, quantized, weights, jobs, check=None, device=device, num_threads=num_threads, on_bytes=on_bytes
        )
    merged |= result.errors
    for job in jobs:
        plan = job.plan
        if plan.request.id in merged:
            continue
        try:
            write_sidecars(plan, job.directory)
        except MergefleetError as error:
            merged[plan.request.id] = error
        else:
            merged[plan.request.id] = Subject(
                request=plan.request,
                merged=job.directory,
                adapter=plan.opened,
                streamed=not (plan.by_peft or plan.opened.deltas),
            )
    return merged
