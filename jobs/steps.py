"""The numbers that trainers put at the end of the names of what they save: `checkpoint-1500` is of step 1500."""

import re

_NUMBER = re.compile(r"[0-9]{1,100}\Z")
_DIGITS = re.compile(r"([0-9]{1,100})")


def step_of(name: str) -> int | None:
    """Return the number that a name ends in; None where it ends in none."""
    found = _NUMBER.search(name)
    return None if found is None else int(found[0])


def in_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a key that sorts names as people count: `checkpoint-900` before `checkpoint-1500`."""
    parts = (part for part in _DIGITS.split(name) if part)
    return tuple((False, int(part), "") if part.isdecimal() and part.isascii() else (True, 0, part) for part in parts)
