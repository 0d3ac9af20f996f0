"""Vocabularies in files whose order tells the ids: lists of words, and pieces of sentencepiece and tiktoken.

Parsed as data: no library makes a tokenizer of them. Sources: sentencepiece_model.proto of sentencepiece 0.2 (field 1
of the model is a piece, field 1 of a piece its text), and the files of tiktoken 0.12 (a token in base64, and its rank).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from jobs.errors import BadInputError
from jobs.text import shown
from workers.files.foreign import read_foreign

_LISTS = (".tiktoken", "vocab.txt", "tiktoken.model")
_MAX_PIECES = 1_000_000
"""The largest in use have a quarter of it."""
_PIECE = 0x0A
"""Protobuf's tag of a field 1 that has a length."""


def is_pieces(name: str) -> bool:
    """Whether a file at the top holds a vocabulary of this kind by its name."""
    return "/" not in name and name.endswith((*_LISTS, ".model"))


def read_pieces(path: Path) -> Mapping[str, int]:
    """Return the tokens of a file by their places; nothing where it is of none of these kinds.

    Raises:
        BadInputError: it has far more of them than any has; and as `open_foreign`.
    """
    data = read_foreign(path)
    if path.name.endswith(_LISTS):
        most = data.count(b"\n")
        pieces: Iterator[str] = (line.decode(errors="replace") for line in data.splitlines())
    else:
        most, pieces = 0, _sentencepieces(data)
    found = dict[str, int]()
    for place, piece in enumerate(pieces if most <= _MAX_PIECES else ()):
        most = max(most, place)
        if most > _MAX_PIECES:
            break
        if piece:
            found[piece] = place
    if most > _MAX_PIECES:
        raise BadInputError(f"{shown(path)}: expected at most {_MAX_PIECES} tokens, found more")
    return found


def _sentencepieces(data: bytes) -> Iterator[str]:
    """Yield the pieces at the front of a model, up to a field of another kind, or one that is cut off."""
    place = 0
    while place < len(data) and data[place] == _PIECE:
        size, begin = _number(data, place + 1)
        place = begin + size
        if size == 0 or place > len(data) or data[begin] != _PIECE:
            return
        length, text = _number(data, begin + 1)
        if text + length > place:
            return
        yield data[text : text + length].decode(errors="replace")


def _number(data: bytes, place: int) -> tuple[int, int]:
    """Return a number of protobuf, seven bits a byte, and where it ends; one that is cut off, or too long, is large."""
    value = 0
    for shift in range(0, 35, 7):
        if place >= len(data):
            break
        value |= (data[place] & 0x7F) << shift
        place += 1
        if data[place - 1] < 0x80:
            return value, place
    return 1 << 40, place
