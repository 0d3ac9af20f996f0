"""Names of batches."""

import re

from jobs.errors import InvalidValueError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


def batch_name(text: str, *, given: bool) -> str:
    """Return the name of a batch.

    Args:
        text: the name, or that of a file.
        given: whether a person chose it; in the name of a file other characters become hyphens.

    Raises:
        InvalidValueError: it can be none.
    """
    name = text if given else _NOT_IN_NAMES.sub("-", text).lstrip("._-")[:128] or "batch"
    if not _NAME.fullmatch(name):
        raise InvalidValueError(
            "a batch of 1 to 128 letters, digits, '.', '_' or '-', a letter or digit first", repr(name)
        )
    return name
