"""How much of what an adapter does is left in a merged checkpoint, and what that proves.

Three distances from base + adapter, on the same positions: to the merged checkpoint, to the base without the adapter,
and to what one correct rounding leaves. The first over the second is the share that is lost; the third over the second
is the share that no merge can keep (docs/decisions/0018-what-an-adapter-does.md).
"""

from jobs.parity_policy import Thresholds
from jobs.parity_report import BehaviourCheck

RESOLUTION_KL = 1e-8
"""Nats: what sums in float32 in another order make of the same model, at most. Nothing smaller is told apart."""


def rounding_share(check: BehaviourCheck) -> float:
    """Return the share of the adapter's effect that a correct merge loses: of an adapter that does nothing, all."""
    lost = max(check.rounding_kl or 0.0, RESOLUTION_KL)
    return lost / check.adapter_kl if check.adapter_kl > 0 else float("inf")


def allowed_share(check: BehaviourCheck, thresholds: Thresholds) -> float:
    """Return the share of the adapter's effect that a merged checkpoint may lose.

    That is what rounding takes, and the threshold more; or a quarter of the rounding more, where that is more: other
    kernels round other elements up and down, which averages out.
    """
    rounding = rounding_share(check)
    return rounding + max(thresholds.max_lost_share, rounding / 4)


def proves_adapter(check: BehaviourCheck, thresholds: Thresholds) -> bool:
    """Return whether a merge without the adapter, which loses all of its effect, would have failed."""
    return allowed_share(check, thresholds) < 1


def keeps_effect(check: BehaviourCheck, thresholds: Thresholds) -> bool:
    """Return whether no more of the adapter's effect is lost than may be; a share that is no number is too much."""
    return check.lost_share is None or check.lost_share <= allowed_share(check, thresholds)


def effect_remarks(check: BehaviourCheck, thresholds: Thresholds, dtype: str) -> tuple[str, ...]:
    """Return what the prompts do not prove, and what rounding takes, where it is worth telling.

    Args:
        check: that gates.
        thresholds: of the request.
        dtype: of the merged checkpoint.
    """
    figures = (
        f"KL {check.adapter_kl:.3g} nats to the base without it, {check.rounding_kl or 0.0:.3g} by rounding to {dtype}"
    )
    rounding = rounding_share(check)
    if not proves_adapter(check, thresholds):
        why = (
            "The prompts show no effect of the adapter above the rounding"
            if 1.25 * rounding >= 1
            else f"A merge without the adapter would pass with max_lost_share {thresholds.max_lost_share:g}"
        )
        return (f"{why} ({figures}): they prove nothing about the adapter, the arithmetic check has to.",)
    if rounding > thresholds.max_lost_share:
        advice = "" if dtype == "float32" else "; dtype: float32 avoids that"
        share = f"{rounding:.0%} of what the adapter does"
        return (f"Rounding to {dtype} alone moves the model by {share} ({figures}){advice}.",)
    return ()
