"""The verdict: what the checks found against the thresholds of the request, as a report."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jobs.errors import BadInputError, NotFoundError
from jobs.parity_report import BehaviourCheck, ParityReport, ParitySummary, TensorCheck
from jobs.release import REPORT_NAME, REPORT_PAGE_NAME
from jobs.text import MAX_MESSAGE, shown
from workers.files.checkpoint import read_shard
from workers.files.layout import CheckpointLayout
from workers.files.local import file_errors
from workers.merging.checks.evidence import Evidence
from workers.merging.checks.judgement import failures as arithmetic_failures
from workers.merging.plain_base import misread_in
from workers.merging.plan import MergePlan
from workers.merging.sidecars import write_text
from workers.merging.wider import kept_in_more_bits
from workers.parity.effect import allowed_share, keeps_effect, rounding_share
from workers.parity.report import render_report

_FAINT = 0.5
"""Share of a delta that rounding leaves, below which a person is told."""
_NUM_NAMED = 20
"""Failures told one by one; a merge that is wrong everywhere needs no list of everything."""


def judge(
    plan: MergePlan,
    wrong: Sequence[str],
    tensors: Sequence[TensorCheck],
    behaviour: Sequence[BehaviourCheck],
    notes: Sequence[str] = (),
) -> ParityReport:
    """Hold what was found against the thresholds.

    Args:
        plan: of the job.
        wrong: what is wrong besides, a sentence each, as `wrong_headers` and `unfounded` find it.
        tensors: the arithmetic check, of every tensor.
        behaviour: the behavioural checks; empty at level `arithmetic`.
        notes: what engines mind that do not refuse the release, a sentence each.

    Returns:
        The report; it passed only if nothing failed.
    """
    request = plan.request
    thresholds = request.parity.thresholds
    wrong = list(wrong)
    named = list(arithmetic_failures(tensors, thresholds.max_rounding_excess).values())
    wrong += named[:_NUM_NAMED]
    if len(named) > _NUM_NAMED:
        wrong.append(f"{len(named) - _NUM_NAMED} more tensors are not base + delta")
    wrong += lost_deltas(plan, tensors)
    instead = "; quantizing merged weights costs that: request output: 16bit, or other thresholds"
    for check in behaviour:
        if not check.gates:
            continue
        advice = instead if plan.storage else ""
        if not check.mean_kl <= thresholds.max_mean_kl:
            wrong.append(
                f"mean KL to {check.reference} is {check.mean_kl:.3g} nats, expected at most {thresholds.max_mean_kl:g}"
                f"{advice}"
            )
        if not check.top1_agreement >= thresholds.min_top1_agreement:
            wrong.append(
                f"top-1 agreement with {check.reference} is {check.top1_agreement:.4f}, expected at least "
                f"{thresholds.min_top1_agreement:g}{advice}"
            )
        if not keeps_effect(check, thresholds):
            wrong.append(
                f"{check.lost_share:.3g} of the adapter's effect is lost: mean KL to {check.reference} is "
                f"{check.mean_kl:.3g} nats, to the base alone {check.adapter_kl:.3g}; expected a share of "
                f"at most {allowed_share(check, thresholds):.3g}, {rounding_share(check):.3g} of it by rounding{advice}"
            )
    if request.parity.level == "full" and not wrong and not any(check.gates for check in behaviour):
        wrong.append("the merged checkpoint was not compared with base + adapter, which level 'full' asks for")
    return ParityReport(
        request_id=request.id,
        merge_key=plan.merge_key,
        base=plan.base.source.location,
        adapter=None if plan.combined else plan.adapter.location,
        adapters=plan.combined,
        combination=request.combination,
        base_quantization=request.base_quantization,
        level=request.parity.level,
        thresholds=thresholds,
        passed=not wrong,
        failures=tuple(wrong),
        kept=kept_in_more_bits(plan),
        notes=(
            *plan.notes,
            *(shown(note, MAX_MESSAGE) for note in notes),
            *_nothing_changed(tensors),
            *_faint(plan, tensors),
            *_kept(plan),
        ),
        tensors=tuple(tensors),
        behaviour=tuple(behaviour),
    )


def lost_deltas(plan: MergePlan, tensors: Sequence[TensorCheck]) -> list[str]:
    """Return one sentence for each tensor of which too little of the delta is left, as many as are told.

    Args:
        plan: of the job.
        tensors: the arithmetic check, of every tensor.
    """
    asked, least = plan.request.parity.thresholds.min_survival, plan.request.parity.least_survival
    lost = [
        check
        for check in tensors
        if check.survival is not None
        and not check.survival >= least
        and (asked is not None or check.requantization_error is not None)
    ]
    lost.sort(key=lambda check: check.survival or 0.0)
    instead = "keep: 16bit, " if plan.storage is not None and plan.request.keep is None else ""
    told = [
        f"tensor {check.tensor}: {check.survival:.3g} of the adapter's delta is left, expected at least {least:g}: too "
        f"small for what the weight is stored in; request {instead}output: 16bit, or another min_survival"
        for check in lost[:_NUM_NAMED]
    ]
    return [*told, *([f"{len(lost) - _NUM_NAMED} more tensors lose as much"] if len(lost) > _NUM_NAMED else [])]


def _nothing_changed(tensors: Sequence[TensorCheck]) -> tuple[str, ...]:
    if not tensors or any(check.changed for check in tensors):
        return ()
    sentence = (
        f"the adapter changes NOTHING: all {len(tensors)} tensors have the values that it was merged into; its "
        "matrices or its scaling are zero, or too small for the dtype of the weights"
    )
    return (sentence,)


def _faint(plan: MergePlan, tensors: Sequence[TensorCheck]) -> tuple[str, ...]:
    """Return what to do where rounding alone takes most of a delta; what is quantized has a threshold for that."""
    faint = [check for check in tensors if check.survival is not None and check.survival < _FAINT]
    if not faint or plan.storage is not None:
        return ()
    least = min(faint, key=lambda check: check.survival or 0.0)
    sentence = (
        f"{len(faint)} tensors keep less than half of the adapter's delta in what they are rounded to, {least.tensor} "
        f"{max(least.survival or 0.0, 0.0):.0%}: it is small beside the weights; float16 or float32 keeps more of it"
    )
    return (sentence,)


def _kept(plan: MergePlan) -> Iterator[str]:
    """Yield what to know of a release some of whose weights are kept in more bits than its form has."""
    kept = kept_in_more_bits(plan)
    if kept is None or not kept.weights:
        return
    yield f"{kept.words}: {plan.request.output} would leave too little of the adapter's delta there"
    if (misread := misread_in(plan)) is not None:
        yield (
            f"transformers 5.23 misreads {misread}, where it dequantizes while it loads, as it does with all experts; "
            "servers that follow config_groups read it"
        )


def summarize(report: ParityReport) -> ParitySummary:
    """Return the figures of a report that go into the manifest."""
    survivals = [check.survival for check in report.tensors if check.survival is not None]
    gating = next((check for check in report.behaviour if check.gates), None)
    return ParitySummary(
        level=report.level,
        num_tensors=len(report.tensors),
        num_changed_tensors=sum(check.changed for check in report.tensors),
        rounding_excess=max((check.rounding_excess for check in report.tensors), default=0.0),
        min_survival=min(survivals, default=None),
        mean_kl=gating.mean_kl if gating else None,
        top1_agreement=gating.top1_agreement if gating else None,
        kl_p999=gating.kl_p999 if gating else None,
        adapter_kl=gating.adapter_kl if gating else None,
        lost_share=gating.lost_share if gating else None,
        proves_adapter=gating.proves_adapter if gating else None,
        num_positions=gating.num_positions if gating else None,
    )


def write_report(report: ParityReport, directory: Path) -> None:
    """Write the report as `parity.json` and as a page, `parity.html`.

    Raises:
        NoCapacityError, AuthError: the disk is full, or the directory cannot be written.
    """
    with file_errors(f"making {directory}", directory):
        # Prompts and texts of requests are in it: for those who run the fleet.
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    write_text(directory / REPORT_NAME, report.model_dump_json(by_alias=True, indent=2) + "\n")
    write_text(directory / REPORT_PAGE_NAME, render_report(report))


def unfounded(evidence: Evidence, checks: Mapping[str, TensorCheck]) -> list[str]:
    """Return one sentence for each tensor of the adapter that nothing in the release was compared with.

    Args:
        evidence: what the adapter says.
        checks: of all tensors of the release, by name.
    """
    names = evidence.unfounded(checks)
    told = [f"adapter tensor {name}: it left nothing in the release" for name in names[:_NUM_NAMED]]
    return [
        *told,
        *([f"{len(names) - _NUM_NAMED} more adapter tensors left nothing"] if len(names) > _NUM_NAMED else []),
    ]


def wrong_headers(layout: CheckpointLayout, directory: Path) -> list[str]:
    """Return one sentence for each shard whose header or size is not what was planned.

    Tensors are compared byte for byte elsewhere; with the headers, every byte of every shard is covered.
    """
    wrong = []
    for shard in layout.shards:
        try:
            found = read_shard(directory / shard.name)
        except (BadInputError, NotFoundError) as error:
            wrong.append(str(error))
            continue
        if found.header != shard.header:
            wrong.append(f"shard {shard.name}: its header is not the one that was planned")
    return wrong
