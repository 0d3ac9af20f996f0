"""The `plan` command: what each request would do, from headers alone. Nothing is merged, and no weight is read."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import MergefleetError
from jobs.request import MergeRequest
from workers.merging.base_plan import BasePlan, plan_base
from workers.merging.outcomes import Failure
from workers.merging.plan import plan_merge
from workers.numerics.device import resolve_device
from workers.sources.fetch import fetch_base
from workers.unit.estimate import Preview, estimate
from workers.unit.request_adapters import outline_adapters
from workers.unit.vetting import server, vet_base


def preview(
    requests: Sequence[MergeRequest],
    cache: Path,
    num_threads: int | None,
    device: str,
    *,
    inert_fields: frozenset[str] = frozenset(),
) -> tuple[Preview, ...]:
    """Plan every request; a base is planned once for all that share a pass.

    Args:
        requests: as submitted.
        cache: where fetched sources are kept.
        num_threads: of the worker the time is estimated for; None for all cores.
        device: that worker's: `cpu`, `cuda`, or `auto` for CUDA where this machine has any.
        inert_fields: of adapters' configurations, that PEFT may not know and that change no merge.

    Returns:
        One preview for each request, in their order.
    """
    server.start()  # before there are threads, while it costs nothing
    passes: dict[str, list[MergeRequest]] = defaultdict(list)
    for request in requests:
        passes[request.pass_key()].append(request)
    threads = num_threads or len(os.sched_getaffinity(0))
    if device == "auto":
        device = resolve_device(device).type
    found = {
        each.request.id: each
        for group in passes.values()
        for each in _preview_pass(group, cache, threads, device, inert_fields=inert_fields)
    }
    return tuple(found[request.id] for request in requests)


def _preview_pass(
    requests: list[MergeRequest], cache: Path, num_threads: int, device: str, *, inert_fields: frozenset[str]
) -> list[Preview]:
    try:
        source = fetch_base(requests[0].base, cache)
        vet_base(source, requests[0])
        base = plan_base(source, requests[0])
    except MergefleetError as error:
        return [Preview(request=request, estimate=None, failure=Failure.of(error)) for request in requests]
    return [_preview_job(base, request, cache, num_threads, device, inert_fields=inert_fields) for request in requests]


def _preview_job(
    base: BasePlan, request: MergeRequest, cache: Path, num_threads: int, device: str, *, inert_fields: frozenset[str]
) -> Preview:
    try:
        with tempfile.TemporaryDirectory(prefix="mergefleet-plan-") as outline:
            adapter = outline_adapters(request, base.source, cache, Path(outline), inert_fields)
            plan = plan_merge(base, request, adapter, inert_fields)
            estimated = estimate(plan, num_threads, device)
            return Preview(request=request, estimate=estimated, failure=None, notes=plan.notes)
    except MergefleetError as error:
        return Preview(request=request, estimate=None, failure=Failure.of(error))
