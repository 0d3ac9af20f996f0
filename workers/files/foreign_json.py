"""JSON from outside: parsed under bounds that no real configuration comes near (docs/bounds.md)."""

import json
import re
from typing import Any

from jobs.errors import BadInputError
from jobs.text import shown

MAX_DEPTH = 60
MAX_VALUES = 4_000_000
"""The tokenizer of Gemma 3 has 1.9 million. Commas and brackets in texts count as well, as they are counted before
anything is made of them: 115 MiB of empty objects would take 3.6 GB."""
MAX_DIGITS = 100
"""Of a number. Tokenizers say "no limit" as the integer 1e30, which has 31."""

_HOLDERS = (dict, list)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape of half a character: two may be a whole one. UTF-8 itself has no halves."""


def parse_json(data: bytes, path: object, what: str = "readable JSON") -> Any:
    """Parse the JSON of a file from outside.

    Args:
        data: its bytes.
        path: of the file, or its address, for messages.
        what: is expected, for messages.

    Raises:
        BadInputError: it is no JSON, or beyond the bounds; the message names the field.
    """
    where = shown(path)
    # Each value but the first stands behind a comma or a bracket.
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise BadInputError(f"{where}: expected {what} of at most {MAX_VALUES} values, found more")
    try:
        value = json.loads(data.decode(), parse_int=_integer)
        _check_depth(value, where)
        if _HALF.search(data):
            _check_text(value, where)
    except RecursionError as error:
        raise BadInputError(f"{where}: expected {what} of values nested at most {MAX_DEPTH} deep") from error
    except MemoryError as error:
        raise BadInputError(f"{where}: expected {what}, found more than fits into memory") from error
    except ValueError as error:
        raise BadInputError(f"{where}: expected {what}, found: {shown(error, 200)}") from error
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, expected at most {MAX_DIGITS}")
    return int(text)


def _check_depth(value: Any, where: str) -> None:
    """Check without recursion, level by level; what holds nothing is left out."""
    level = [("", value)]
    for _ in range(MAX_DEPTH):
        inner: list[tuple[str, Any]] = []
        for field, each in level:
            if isinstance(each, dict):
                inner += [pair for pair in each.items() if pair[1] and isinstance(pair[1], _HOLDERS)]
            elif isinstance(each, list):
                inner += [(field, item) for item in each if item and isinstance(item, _HOLDERS)]
        if not inner:
            return
        level = inner
    raise BadInputError(
        f"{where}: field {shown(level[0][0], 80)}: expected values nested at most {MAX_DEPTH} deep, found more"
    )


def _check_text(value: Any, where: str) -> None:
    rest = [("", value)]
    while rest:
        field, each = rest.pop()
        if isinstance(each, dict):
            for name in each:
                if not _is_unicode(name):
                    raise BadInputError(f"{where}: expected names of valid Unicode, found {shown(name, 80)}")
            rest += each.items()
        elif isinstance(each, list):
            rest += [(field, item) for item in each]
        elif isinstance(each, str) and not _is_unicode(each):
            raise BadInputError(f"{where}: field {shown(field, 80)}: expected valid Unicode, found {shown(each, 80)}")


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
