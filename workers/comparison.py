"""The same adapters merged into the base in its other weights, so that a person can choose: `compare` of a request.

Both merged checkpoints are asked by the same two references, base + adapter in 16 bits and in 4. What is made here is
compared and dropped; nothing of it is published (docs/decisions/0010-comparison.md).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from jobs.errors import MergefleetError
from jobs.release import Alternative
from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from workers.behaviour import Subject, check_behaviour
from workers.merge import run_pass
from workers.module_weights import module_weights
from workers.passes import PassJob
from workers.plan import MergePlan, plan_base, plan_merge
from workers.quantized_base import QuantizedCache
from workers.references import references
from workers.scratch import OwnedDirectory
from workers.sidecars import write_sidecars


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
    cancelled: Callable[[], None],
) -> dict[str, Alternative | MergefleetError]:
    """Merge jobs of one pass into their base in its other weights, and ask what comes out.

    Args:
        plans: of the jobs; their base is not stored in 4-bit.
        cache: of quantized bases.
        scratch: existing directory for the checkpoints that are compared; emptied again.
        device: where tiles are computed and models run.
        num_threads: threads that compute.
        cancelled: raises CancelledError when the work should stop.

    Returns:
        By request id, what was found, or the error that this job's comparison failed with.

    Raises:
        CancelledError: by `cancelled`.
        NoCapacityError: scratch is full.
    """
    source = plans[0].base.source
    requests = [other_way(plan.request) for plan in plans]
    base = plan_base(source, requests[0])
    found: dict[str, Alternative | MergefleetError] = {}
    others = [plan_merge(base, request, plan.adapter) for request, plan in zip(requests, plans, strict=True)]
    quantized = None
    if base.quantization is not None:
        quantized = cache.open(base.quantization, lambda _: cancelled())
    room = OwnedDirectory(scratch, "compared-")
    try:
        directories = {plan.request.id: room.path / str(number) for number, plan in enumerate(others)}
        for directory in directories.values():
            directory.mkdir()
        jobs = [
            PassJob(plan=plan, directory=directories[plan.request.id], on_file=lambda _: None, check=cancelled)
            for plan in others
        ]
        with module_weights(base, quantized, others, scratch, lambda _: cancelled()) as weights:
            result = run_pass(
                base, quantized, weights, jobs, device=device, num_threads=num_threads, on_bytes=lambda _: None
            )
        found |= result.errors
        subjects = []
        for plan in others:
            if plan.request.id not in found:
                directory = directories[plan.request.id]
                write_sidecars(plan, directory)
                subjects.append(
                    Subject(request=plan.request, merged=directory, adapter=plan.opened, streamed=not plan.by_peft)
                )
        if subjects:
            # The two references of the release, from the other side: what informed there is this merge's own here.
            beside = [
                dataclasses.replace(reference, gates=not reference.gates)
                for reference in reversed(references(source.directory, plans[0].request))
            ]
            answers = check_behaviour(source.directory, subjects, device, room.path, cancelled=cancelled, beside=beside)
            found |= {
                name: answer
                if isinstance(answer, MergefleetError)
                else Alternative(base_quantization=requests[0].base_quantization, behaviour=answer)
                for name, answer in answers.items()
            }
    finally:
        room.remove()
    return found
