"""Enough positions to compare: prompts of a request, followed by built-in ones where they alone have too few.

What counts is a position after which both models say what comes next, each context once: chat templates begin all
prompts with the same words. Answers are not counted on, as they may end at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One prompt."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The prompts that are asked."""

    asked: tuple[Asked, ...]
    nums_shared: tuple[int, ...]
    """For each prompt, how many of its first tokens, but for its last, an earlier one begins with: what a model says
    there has been compared."""
    remarks: tuple[str, ...]
    """What the report should say about it."""


def select(own: Sequence[Asked], further: Callable[[int], Asked | None], min_positions: int) -> Selection:
    """Return a request's prompts, and as many built-in ones as it takes.

    Args:
        own: the request's, at least one token each.
        further: returns the next built-in one, of about as many tokens as are missing; None where there is no more.
        min_positions: how many positions to compare at least, answers not counted.
    """
    asked: list[Asked] = []
    nums_shared: list[int] = []
    num_positions = 0
    waiting = list(own)
    while waiting or num_positions < min_positions:
        one = waiting.pop(0) if waiting else further(min_positions - num_positions)
        if one is None:
            break
        begun = max((num_shared(one.token_ids, earlier.token_ids) for earlier in asked), default=0)
        nums_shared.append(min(begun, len(one.token_ids) - 1))
        asked.append(one)
        num_positions += len(one.token_ids) - nums_shared[-1]
    remarks = []
    if len(asked) > len(own):
        remarks.append(
            f"The last {len(asked) - len(own)} prompts are built in: the others have fewer than {min_positions} "
            "positions to compare (parity.min_positions)."
        )
    if num_positions < min_positions:
        remarks.append(
            f"The prompts have {num_positions} positions instead of {min_positions} (parity.min_positions): no more "
            "built-in ones fit into the model's context."
        )
    return Selection(asked=tuple(asked), nums_shared=tuple(nums_shared), remarks=tuple(remarks))


def num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))
