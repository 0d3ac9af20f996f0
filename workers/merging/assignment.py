"""Which lane makes which output tensor, and what comes apart that the base has as one."""

import dataclasses

from jobs.errors import UnsupportedError
from workers.adapters.adapter import Adapter
from workers.adapters.coverage import Coverage
from workers.merging.base_plan import BasePlan


def all_apart(base: BasePlan, coverage: Coverage) -> Coverage:
    """Return a coverage in which nothing is tied any more: one flag of the configuration ties all, or nothing."""
    others = base.tied.keys() - coverage.untied
    return dataclasses.replace(
        coverage,
        shapes={**coverage.shapes, **{name: base.conversions.shapes[name] for name in others}},
        untied=coverage.untied | others,
        left_alone=coverage.left_alone | {name for name in others if name not in coverage.shapes},
    )


def made_by_peft(
    base: BasePlan, adapter: Adapter, coverage: Coverage, streamed: frozenset[str]
) -> dict[str, tuple[str, ...]]:
    """Return what is left to PEFT: by output tensor, names in the model of what it is made of.

    Args:
        base: planned.
        adapter: opened.
        coverage: what it changes, by names in the model.
        streamed: names in the model of the weights that are streamed.

    Raises:
        UnsupportedError: the adapter changes what the base does not store.
    """
    conversions = base.conversions
    made: dict[str, tuple[str, ...]] = {}
    for name in coverage.shapes:
        # Beside a streamed weight nothing changes but what the adapter brings itself.
        if name in streamed or (f"{name.rpartition('.')[0]}.weight" in streamed and name not in coverage.replaced):
            continue
        # What keeps the base's values is copied like any other tensor, if it has a place in the base's files.
        if name in coverage.left_alone and name in conversions.stored_names:
            continue
        # Values that stay tied are written under each name the base stores them by.
        same = (name,) if name in coverage.untied else coverage.tied.get(name, (name,))
        group = next((conversions.group_of[other] for other in same if other in conversions.group_of), None)
        if group is not None:
            made |= dict.fromkeys(group.stored, group.parameters)
            continue
        outputs = [conversions.stored_names[other] for other in same if other in conversions.stored_names]
        if not outputs and adapter.head is not None and name in adapter.head.shapes:
            outputs = [name]
        if not outputs and name in coverage.untied:
            outputs = [conversions.new_name(name)]
        if not outputs:
            raise UnsupportedError(
                f"{adapter.directory}: the adapter changes {name}, which {base.source.directory} does not store"
            )
        made |= dict.fromkeys(outputs, same[:1])
    return made
