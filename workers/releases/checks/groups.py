"""Stored tensors that are put together while loading: experts one by one, and parts that are fused."""

import re
from collections import defaultdict
from collections.abc import Iterator

from transformers.core_model_loading import WeightConverter

from jobs.errors import UnsupportedError
from workers.bases.routes import converted_shapes
from workers.releases.checks.skeletons import Skeleton

_LAST_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def groups(skeleton: Skeleton) -> dict[str, list[str]]:
    """Return the stored tensors that are put together, by the model's tensor that they are parts of."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, (target, pattern) in skeleton.targets.items():
        if pattern is not None and target in skeleton.state:
            found[target].append(name)
    return found


def absent_parts(skeleton: Skeleton) -> list[str]:
    """Return stored names that are missing among those that are put together: one expert of several, or one part."""
    members: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for target, stored in groups(skeleton).items():
        for name in stored:
            members[target][str(skeleton.targets[name][1])].add(name)
    numbers: dict[str, set[str]] = defaultdict(set)
    for parts in members.values():
        for names in parts.values():
            for name in sorted(names):
                rule = skeleton.routes.by_pattern[str(skeleton.targets[name][1])]
                numbers[_owner(rule)].update(_LAST_NUMBER.findall(name)[-1:])
    absent = []
    for target, parts in members.items():
        rule = skeleton.routes.by_pattern[next(iter(parts))]
        for pattern in rule.source_patterns:
            there = parts.get(pattern, set())
            if "*" not in pattern or not there:
                absent += [] if there else [f"{target} (its part {pattern})"]
                continue
            held = {number for name in there for number in _LAST_NUMBER.findall(name)[-1:]}
            one = min(there)
            front, _, back = one.rpartition(f".{_LAST_NUMBER.findall(one)[-1]}.")
            absent += [f"{front}.{number}.{back}" for number in sorted(numbers[_owner(rule)] - held)]
    return absent


def _owner(rule: WeightConverter) -> str:
    """Return the module that holds what a rule makes: the experts of a layer, whose numbers all its rules share."""
    return str(rule.target_patterns[0]).rpartition(".")[0]


def wrong_groups(skeleton: Skeleton) -> Iterator[tuple[str, object, object]]:
    """Yield a stored tensor of each group that makes another shape than the model has, that shape, and the model's."""
    for target, names in groups(skeleton).items():
        shapes = {name: shape for name in names if (shape := skeleton.stored[name]) is not None}
        if len(shapes) < len(names):
            continue  # codes, of which nothing tells a shape
        try:
            made = converted_shapes(skeleton.model, skeleton.routes, target, shapes)
        except UnsupportedError:
            yield names[0], f"{list(shapes[names[0]])} beside others of other shapes", "parts of one shape"
            continue
        for name, shape in made.items():
            expected = tuple(skeleton.state[name].shape) if name in skeleton.state else None
            if expected is not None and shape != expected:
                yield names[0], list(shape), list(expected)
