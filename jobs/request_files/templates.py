"""Placeholders such as `{adapter}` in the ids, destinations and labels of a request file."""

import re
from collections.abc import Mapping

from jobs.errors import InvalidValueError

PLACEHOLDERS = ("base", "adapter", "step", "quantization", "id")

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def fill(template: str, names: Mapping[str, str | None]) -> str | None:
    """Fill in a template.

    Args:
        template: text with placeholders; `{{` and `}}` stand for braces.
        names: what each placeholder stands for. One that is left out has no value in this place; None is the value of
            one that is wrong itself.

    Returns:
        The text, or None when it depends on a value that is wrong itself.

    Raises:
        InvalidValueError: braces do not match, or a placeholder is unknown or has no value.
    """
    pieces: list[str | None] = []
    end = 0
    for match in _BRACES.finditer(template):
        pieces.append(template[end : match.start()])
        pieces.append(match[0][0] if match[0] in ("{{", "}}") else _value(match[1], names, template))
        end = match.end()
    pieces.append(template[end:])
    return None if None in pieces else "".join(piece for piece in pieces if piece is not None)


def _value(placeholder: str | None, names: Mapping[str, str | None], template: str) -> str | None:
    if placeholder is None:
        raise InvalidValueError("braces in pairs ('{{' and '}}' for braces themselves)", repr(template))
    if placeholder not in PLACEHOLDERS:
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise InvalidValueError(f"no placeholders but {known}", f"'{{{placeholder}}}'")
    if placeholder == "step" and placeholder not in names:
        expected = "one adapter, in a folder whose name ends in a number, where {step} is used"
        raise InvalidValueError(expected, repr(names.get("adapter") or "none"))
    if placeholder not in names:
        field = {"quantization": "a base_quantization other than default"}.get(placeholder, placeholder)
        raise InvalidValueError(f"a request with {field} where {{{placeholder}}} is used", "none")
    return names[placeholder]
