"""Text from outside, made fit to be shown: in messages, tables, logs and JSON.

File names, field names, labels and what libraries say of them are data. On their way to a person they keep every
character that has a shape; what acts on a terminal or on the text around it becomes a visible escape.
"""

import unicodedata
from typing import Any

MAX_SHOWN = 2_000
"""Characters of one thing that are shown; what is longer is cut."""

MAX_MESSAGE = 8_000
"""Characters of a message that is kept with a job."""

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | frozenset(
    chr(number)
    for first, last in ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))  # variation selectors
    for number in range(first, last + 1)
)
"""Characters that count as letters or marks, and are drawn as nothing."""


def shown(text: Any, most: int = MAX_SHOWN, *, lines: bool = False) -> str:
    """Return text from outside as it may be shown: valid Unicode of visible characters, at most so many.

    Args:
        text: anything; what is no text is shown as `str` has it.
        most: characters that are kept.
        lines: whether line ends stay.
    """
    whole = text if type(text) is str else str(text)
    cut = whole[:most]
    if not (cut.isascii() and cut.isprintable()):
        cut = "".join(letter if _stays(letter, lines=lines) else _escaped(letter) for letter in cut)
    return cut if len(whole) <= most else f"{cut}… ({len(whole) - most} more characters)"


def _stays(letter: str, *, lines: bool) -> bool:
    if letter == "\n":
        return lines
    return letter not in _BLANK and (letter.isprintable() or unicodedata.category(letter) == "Zs")


def _escaped(letter: str) -> str:
    number = ord(letter)
    if letter in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[letter]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
