"""Declarations of transformers' own forms, which list the modules that are not converted."""

from collections.abc import Mapping
from typing import Any

from workers.bases.forms import Wider

_FIELD = "modules_to_not_convert"


def with_left_out(content: Mapping[str, Any], wider: Wider) -> Mapping[str, Any]:
    """Return a declaration with further modules that are numbers.

    Those that a base has as numbers are named, too, where it has no list: without one transformers leaves out the head
    by itself, and with one only what is in it.

    Args:
        content: of the declaration so far.
        wider: what is kept in 16 bits.
    """
    before = wider.plain if content.get(_FIELD) is None else content[_FIELD]
    return {**content, _FIELD: list(dict.fromkeys([*before, *wider.as_numbers]))}
