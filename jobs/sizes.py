"""Sizes, as people write them: `5GB`, `500 MiB`."""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from jobs.errors import InvalidValueError

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?\s*", re.IGNORECASE)
_UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))} | {
    unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), start=1)
}


def parse_size(value: Any) -> Any:
    """Turn `"2GB"` or `"500 MiB"` into bytes; leave everything else to pydantic.

    Raises:
        InvalidValueError: the text is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise InvalidValueError("a size such as 5GB or 500MiB", repr(value))
    return int(Decimal(match[1]) * _UNITS[(match[2] or "B").upper()])


NumBytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
