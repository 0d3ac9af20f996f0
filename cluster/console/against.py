"""What was found of a checkpoint beside a release, for a person and for a program."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from cluster.console.display import cell, line
from workers.against.comparison import NUM_WORST, Comparison
from workers.against.figures import Figures
from workers.parity.beside_release import Beside


def against_document(found: Comparison) -> dict[str, Any]:
    """Return all of it."""
    accounts, behaviour = found.accounts, found.behaviour
    return {
        "location": str(found.checkpoint),
        "against": str(found.release),
        "merge_key": found.manifest.merge_key,
        "passed": found.passed,
        "form": found.form,
        "base": None if found.base is None else str(found.base),
        "base_quantization": found.manifest.base_quantization.value,
        "failures": list(found.failures),
        "notes": list(found.notes),
        "limits": {
            "min_survival": found.limits.min_survival,
            "max_error": found.limits.max_error,
            "max_mean_kl": found.limits.max_mean_kl,
            "min_top1_agreement": found.limits.min_top1_agreement,
            "max_lost_share": found.limits.max_lost_share,
        },
        "weights": {
            "num": len(found.weights),
            "num_with_delta": len(found.survivals),
            "num_below_min_survival": found.num_below,
            "median_survival": found.median_survival,
            "median_error": found.median_error,
            "worst_survival": [_tensor(each) for each in found.survivals[:NUM_WORST]],
            "worst_error": [_tensor(each) for each in found.errors[:NUM_WORST]],
        },
        "tensors": [_tensor(each) for each in found.figures],
        "missing": list(accounts.missing),
        "misshapen": dict(accounts.misshapen),
        "extra": list(accounts.extra),
        "left_out": list(accounts.left_out),
        "fixed_scales": list(accounts.fixed),
        "changed": [each.pair.release for each in found.changed],
        "folded": {**found.foldings.small, **found.foldings.weights},
        "behaviour": None if behaviour is None else _behaviour(behaviour),
    }


def _tensor(each: Figures) -> dict[str, Any]:
    return {
        "tensor": each.pair.release,
        "stored_as": each.pair.checkpoint,
        "in_form": each.in_form,
        "num_different": each.num_different,
        "error": _finite(each.error),
        "delta": None if each.delta is None else _finite(each.delta),
        "survival": each.survival,
        "error_without_scales": None if each.scaled is None else _finite(each.scaled.error),
    }


def _behaviour(found: Beside) -> dict[str, Any]:
    return {
        "num_positions": found.num_positions,
        "num_near_ties": found.num_near_ties,
        "release_nll": found.release_nll,
        "checkpoint_nll": found.checkpoint_nll,
        "base_nll": found.base_nll,
        "mean_kl": found.mean_kl,
        "kl_p999": found.kl_p999,
        "top1_agreement": found.top1_agreement,
        "adapter_kl": found.adapter_kl,
        "lost_share": found.lost_share,
        "remarks": list(found.remarks),
    }


def _finite(value: float) -> float | None:
    """Return a number that JSON has; None for infinity."""
    return value if value < float("inf") else None


def against_view(found: Comparison) -> RenderableType:
    """Return a short table, the failures and notes, and the verdict in the last line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(cell(name), cell(value))
    count = len(found.failures)
    verdict = (
        line(f"{found.checkpoint}: is {found.release} in another form", "green")
        if found.passed
        else line(f"{found.checkpoint}: does not pass as {found.release}: {count} reasons above", "red")
    )
    return Group(
        table,
        *_worst("least of the delta left", found.survivals[:NUM_WORST]),
        *_worst("largest errors", found.errors[:NUM_WORST]),
        *(line(f"note: {note}", "yellow") for note in found.notes),
        *(line(f"failed: {failure}", "red") for failure in found.failures),
        verdict,
    )


def _rows(found: Comparison) -> list[tuple[str, str]]:
    manifest, limits, behaviour = found.manifest, found.limits, found.behaviour
    rows = [
        ("release", f"{manifest.request_id}, merge key {manifest.merge_key[:16]}, verified"),
        ("stored in", found.form or "plain numbers"),
        ("base", "not at hand" if found.base is None else f"{found.base} ({manifest.base_quantization})"),
    ]
    if found.figures:
        numbers = [each for each in found.figures if not each.in_form]
        folded = f" and {len(found.folded)} with scales folded in" if found.folded else ""
        beside = f", {len(found.foldings.small)} folded" if found.foldings.small else ""
        counts = (
            f"{len(found.weights)} in the form{folded}; {len(numbers)} in numbers{beside}, {len(found.changed)} changed"
        )
        survival = "not measured"
        if found.survivals:
            survival = (
                f"median {_figure(found.median_survival)} of {len(found.survivals)} weights, {found.num_below} below "
                f"{limits.min_survival:g}"
            )
        rows += [
            ("tensors", counts),
            ("relative error", f"median {_figure(found.median_error)}"),
            ("survival of the delta", survival),
        ]
    if behaviour is None:
        return [*rows, ("behaviour", "not measured")]
    rows += [
        ("mean KL", f"{behaviour.mean_kl:.3g} nats (at most {limits.max_mean_kl:g}), 99.9 % {behaviour.kl_p999:.3g}"),
        ("top-1 agreement", f"{behaviour.top1_agreement:.4f} (at least {limits.min_top1_agreement:g})"),
        ("NLL", f"release {behaviour.release_nll:.4f}, checkpoint {behaviour.checkpoint_nll:.4f}"),
    ]
    if behaviour.adapter_kl is not None:
        share = f"{_figure(behaviour.lost_share)} of the KL between release and base, {behaviour.adapter_kl:.3g} nats"
        rows.append(("beside the adapter", f"{share} (at most {limits.max_lost_share:g})"))
    return rows


def _worst(title: str, worst: Sequence[Figures]) -> list[RenderableType]:
    if not worst:
        return []
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    for name in ("survival", "error", "delta"):
        table.add_column(name, justify="right")
    for each in worst:
        table.add_row(cell(each.pair.release), _figure(each.survival), _figure(each.error), _figure(each.delta))
    return [table]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
