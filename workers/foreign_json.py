"""JSON from outside: parsed under bounds that no real configuration comes near (docs/bounds.md)."""

import json
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError
from jobs.text import shown

MAX_DEPTH = 60
MAX_VALUES = 2_000_000
MAX_DIGITS = 100
"""Of a number. Tokenizers say "no limit" as the integer 1e30, which has 31."""


def parse_json(data: bytes, path: Path, what: str = "readable JSON") -> Any:
    """Parse the JSON of a file from outside.

    Args:
        data: its bytes.
        path: of the file, for messages.
        what: is expected, for messages.

    Raises:
        BadInputError: it is no JSON, or beyond the bounds; the message names the field.
    """
    where = shown(path)
    try:
        value = json.loads(data.decode(), parse_int=_integer)
        _check(value, where)
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


def _check(value: Any, where: str) -> None:
    """Check depth, count and text of all values; without recursion, level by level."""
    level, num_values = [("", value)], 1
    for _ in range(MAX_DEPTH + 1):
        inner: list[tuple[str, Any]] = []
        for field, each in level:
            if isinstance(each, dict):
                for name, item in each.items():
                    if not _is_unicode(name):
                        raise BadInputError(f"{where}: expected names of valid Unicode, found {shown(name, 80)}")
                    inner.append((name, item))
            elif isinstance(each, list):
                inner.extend((field, item) for item in each)
            elif isinstance(each, str) and not _is_unicode(each):
                raise BadInputError(
                    f"{where}: field {shown(field, 80)}: expected valid Unicode, found {shown(each, 80)}"
                )
        num_values += len(inner)
        if num_values > MAX_VALUES:
            raise BadInputError(f"{where}: expected at most {MAX_VALUES} values, found more")
        if not inner:
            return
        level = inner
    raise BadInputError(
        f"{where}: field {shown(level[0][0], 80)}: expected values nested at most {MAX_DEPTH} deep, found more"
    )


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
