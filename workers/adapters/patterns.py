"""Patterns and ends of names in a configuration, moved to where a base has its modules."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key


def move_patterns(config: Any, moved: Mapping[str, str]) -> None:
    """Let ranks, scalings and targets that the configuration gives to old names hold for the new ones."""
    for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = getattr(config, field, None)
        if not patterns:
            continue
        explicit = {}
        for old, new in moved.items():
            wanted = patterns.get(get_pattern_key(patterns.keys(), old), getattr(config, default))
            if patterns.get(get_pattern_key(patterns.keys(), new), getattr(config, default)) != wanted:
                explicit[f"^{re.escape(new)}"] = wanted
        setattr(config, field, explicit | patterns)
    targets = getattr(config, "target_modules", None)
    if targets is None:
        return
    left = [
        new
        for old, new in moved.items()
        if not check_target_module_exists(config, new) and check_target_module_exists(config, old)
    ]
    if left and isinstance(targets, str):
        config.target_modules = "|".join([f"(?:{targets})", *map(re.escape, left)])
    elif left:
        config.target_modules = {*targets, *left}


def move_ends(config: Any, moved: Mapping[str, str], modules: frozenset[str]) -> None:
    """Let what the configuration names by the ends of old names be found: whole modules, tokens and parameters."""
    places: dict[str, str] = {}
    for old, new in moved.items():
        was, now = old.split("."), new.split(".")
        ends = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(was), reversed(now), strict=False))
        for length in range(len(list(ends)) + 1):
            place = ".".join(now[: len(now) - length])
            if place in modules:
                places[".".join(was[: len(was) - length])] = place

    def find(end: str, start: str = "") -> list[str]:
        def has(name: str) -> bool:
            return f"{start}{name}".endswith(f"{start}{end}")

        found = [new for old, new in places.items() if has(old) and not has(new)]
        return [end, *found] if not found or any(map(has, modules)) else found

    whole = getattr(config, "modules_to_save", None)
    if whole:
        config.modules_to_save = [name for end in whole for name in find(end)]
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, dict):
        config.trainable_token_indices = {name: indices for end, indices in tokens.items() for name in find(end)}
    parameters = getattr(config, "target_parameters", None)
    if parameters:
        split = [parameter.rpartition(".") for parameter in parameters]
        config.target_parameters = [
            f"{name}{dot}{key}" for module, dot, key in split for name in (find(module, ".") if module else [""])
        ]
