"""The pieces of a pass: sets of output shards that can be written without looking at any other."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from workers.merging.at_risk import at_risk
from workers.merging.outcomes import Piece
from workers.merging.plan import MergePlan
from workers.merging.storage import WeightStorage


def pieces_of(plans: Sequence[MergePlan]) -> tuple[Piece, ...]:
    """Cut a pass into as many pieces as its plans allow.

    Shards are in one piece when a tensor of the base is in both (in different jobs), when a weight is quantized again
    into both, when a weight that may be kept in more bits takes one of the other with it, or when PEFT makes tensors of
    both at once: those of a module, of a group of fused weights, or with values that are shared. Layers of other
    methods than LoRA may look at each other's weights; where these have to be written first, as they are not mapped
    from the base, all that PEFT makes is one piece.

    Args:
        plans: of the jobs of the pass.

    Returns:
        The pieces, in the order of the shards; every shard of every plan is in one of them.
    """
    shards = _Sets()
    sizes: dict[str, int] = defaultdict(int)
    holders: dict[str, list[str]] = defaultdict(list)
    for plan in plans:
        for shard in plan.output.shards:
            shards.join([shard.name])
            sizes[shard.name] += shard.num_bytes
        # A release in a form has parts of a weight where another job has the weight.
        for name, (shard, _) in {**plan.merged.tensors, **plan.output.tensors}.items():
            holders[name].append(shard.name)
        for outputs in _made_at_once(plan):
            shards.join(plan.merged.tensors[output][0].name for output in outputs)
        for name, parts in plan.requantized.items():
            shards.join(plan.output.tensors[stored][0].name for stored in parts.names)
            assert plan.storage is not None
            numbers = [plan.merged.tensors[each][0].name for each in plan.storage.companions(name)]
            shards.join([*numbers, plan.output.tensors[parts.codes][0].name])
        if plan.request.keep is not None and isinstance(plan.storage, WeightStorage):
            for group in at_risk(plan.storage, [name for name in plan.requantized if name in plan.changed]):
                stored = [part for name in group for part in plan.storage.in_form[name].names]
                shards.join([*(plan.output.tensors[part][0].name for part in stored), *map(plan.shard_of, group)])
    for names in holders.values():
        shards.join(names)
    return tuple(
        Piece(shards=tuple(names), num_bytes=sum(sizes[name] for name in names)) for names in shards.disjoint()
    )


def _made_at_once(plan: MergePlan) -> Iterable[list[str]]:
    """Return the outputs of the `peft` lane by what they have in common: a module, a group, or shared values."""
    by_origin: dict[object, list[str]] = defaultdict(list)
    entangled = plan.opened.method != "LORA" and not all(
        plan.base.by_name[output].copied for output in plan.by_peft if output in plan.base.by_name
    )
    for output, sources in plan.by_peft.items():
        by_origin[sources].append(output)
        if entangled and output not in plan.regrouped:
            by_origin["layers"].append(output)
        for source in sources:
            by_origin[source.rpartition(".")[0]].append(output)
            if source in plan.tied:
                by_origin["tied"].append(output)
    return by_origin.values()


class _Sets:
    """Names in sets that grow together; kept in the order in which they came."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def join(self, names: Iterable[str]) -> None:
        """Put names, and those that share a set with them, into one set."""
        roots = [self._root(name) for name in names]
        for root in roots[1:]:
            self._parents[root] = roots[0]

    def disjoint(self) -> Iterable[list[str]]:
        """Return the sets."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self._parents:
            found[self._root(name)].append(name)
        return found.values()

    def _root(self, name: str) -> str:
        while (parent := self._parents.setdefault(name, name)) != name:
            name = parent
        return name
