"""Values of `adapter_config.json` that PEFT stumbles over without saying which field they are in."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from jobs.errors import BadInputError
from jobs.request_files.problems import show

_PATTERNS = frozenset({"target_modules", "exclude_modules", "layers_pattern"})
"""Fields that are regular expressions, or hold some."""
_PATTERNS_BY_NAME = frozenset({"rank_pattern", "alpha_pattern"})
"""Fields whose names are regular expressions."""


def check_values(path: Path, given: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Check truth values, numbers and patterns.

    Args:
        path: of the file.
        given: values by field.
        kinds: names of the types that PEFT gives its fields.

    Raises:
        BadInputError: names the field, what was expected and what was found.
    """
    for name, value in given.items():
        if (expected := _expected(name, value, kinds[name])) is not None:
            raise BadInputError(f"{path}: field {name}: expected {expected}, found {show(value)}")
        for pattern in _patterns(name, value):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise BadInputError(
                    f"{path}: field {name}: expected a regular expression, found {show(pattern)}: {error}"
                ) from error


def _expected(name: str, value: Any, kind: str) -> str | None:
    """Return what a field takes, where its value is of another type; None where it may be right."""
    if kind == "bool":
        return None if isinstance(value, (bool, int, NoneType)) else "true or false"
    if kind not in ("int", "float") or value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "a number"
    return "a whole number" if name == "r" and kind == "int" and isinstance(value, float) else None


def _patterns(name: str, value: Any) -> list[str]:
    if name in _PATTERNS and isinstance(value, str):
        return [value]
    return (
        [key for key in value if isinstance(key, str)] if name in _PATTERNS_BY_NAME and isinstance(value, dict) else []
    )
