"""Durations as people write them: `90s`, `12h`, `3d`."""

import re

from jobs.errors import InvalidValueError

_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|m|min|h|d|w)\s*")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


def parse_duration(text: str) -> float:
    """Return a duration in seconds.

    Raises:
        InvalidValueError: it is none.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InvalidValueError("a number with s, m, h, d or w", repr(text))
    return float(match[1]) * _SECONDS[match[2]]
