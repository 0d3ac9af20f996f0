"""Which weights of a release are kept in more bits than its form has: those whose delta that would lose.

Decided on proven merged numbers, before anything of the release is laid out: each weight that the adapter changes is
quantized in memory, one for each thread, and judged by the figures that the check of the release has later.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from jobs.kept import Keep, KeptWeight
from jobs.parity_report import TensorCheck
from workers.merging.at_risk import at_risk
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.checks.stored_checks import survivals
from workers.merging.plan import MergePlan
from workers.merging.storage import WeightStorage
from workers.merging.wider import keeping


def choose_kept(
    plan: MergePlan,
    merged_in: Path,
    proven: Mapping[str, TensorCheck],
    weights: ArithmeticCheck,
    *,
    num_threads: int,
    stop: Callable[[], None],
) -> tuple[KeptWeight, ...]:
    """Return the weights that are kept in more bits.

    Args:
        plan: of the job, or the part of it in work: whole pieces of a pass, nothing in them kept so far.
        merged_in: directory of the merged numbers.
        proven: what was found about the merged numbers, by tensor.
        weights: reads what was merged into.
        num_threads: weights looked at at the same time.
        stop: raises CancelledError when the work should stop; called once per weight.
    """
    keep = plan.request.keep
    if keep is None:
        return ()
    least = plan.request.parity.least_survival
    assert isinstance(plan.storage, WeightStorage)
    touched = [name for name in plan.requantized if name in plan.changed]

    def lost(of: MergePlan, among: frozenset[str]) -> tuple[Mapping[str, float | None], frozenset[str]]:
        names = tuple(name for name in of.requantized if name in among)
        found = survivals(of, names, merged_in, proven, weights, num_threads=num_threads, stop=stop)
        # What is no number is not above the line.
        return found, frozenset(name for name, left in found.items() if left is not None and not left >= least)

    found, too_small = lost(plan, frozenset(touched))
    groups = [group for group in at_risk(plan.storage, touched) if not too_small.isdisjoint(group)]

    def kept(keep_in: Mapping[str, Keep]) -> tuple[KeptWeight, ...]:
        return tuple(
            KeptWeight(weight=name, kept_in=keep_in[name], survival=found.get(name))
            for name in plan.merged.tensors
            if name in keep_in
        )

    if keep is Keep.IN_16_BITS or not groups:
        return kept({name: Keep.IN_16_BITS for group in groups for name in group})
    in_8_bits = kept({name: Keep.IN_8_BITS for group in groups for name in group})
    _, still = lost(keeping(plan, in_8_bits), frozenset(touched) & {each.weight for each in in_8_bits})
    return kept(
        {name: Keep.IN_8_BITS if still.isdisjoint(group) else Keep.IN_16_BITS for group in groups for name in group}
    )
