"""The front of a GGUF file, read under limits: its metadata, and which tensors it says it has.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. Arrays, such as a
vocabulary, are counted and passed over. What a front says is believed by no reader here: that is for
`workers/bases/gguf_files/`.
"""

import io
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jobs.errors import BadInputError
from jobs.text import shown
from workers.files.foreign import foreign_file
from workers.files.local import file_errors

SUFFIX = ".gguf"
MAX_FRONT_BYTES = 128 << 20
"""Of one file. A vocabulary of 256,000 tokens with its merges takes 16."""
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_FIELDS = 10_000
_MAX_TENSORS = 200_000
_MAX_DIMENSIONS = 4
"""Of ggml."""
_ALIGNMENT = "general.alignment"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """A list in the metadata."""

    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufEntry:
    """What a file says of one tensor."""

    name: str
    shape: tuple[int, ...]
    """As torch has it."""
    kind: int
    """A number of `ggml_type`."""
    offset: int
    """From where the tensors begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFront:
    """All that stands before the tensors of a file."""

    fields: Mapping[str, int | float | bool | str | GgufArray]
    tensors: tuple[GgufEntry, ...]
    num_bytes: int
    """Up to the first tensor, padding included."""
    num_file_bytes: int
    """Of the file, as it is."""


def read_front(path: Path) -> GgufFront:
    """Read the front of a file.

    Raises:
        NotFoundError: it is not there.
        BadInputError: it is no GGUF file, or its front is cut short or beyond what one may have.
        AuthError, TransientIOError: it cannot be read, by kind of fault.
    """
    with foreign_file(path, any_size=True) as file, file_errors(f"reading {shown(path)}", path):
        return parse_front(file, path, os.fstat(file.fileno()).st_size)


def front_of(data: bytes, path: Path, num_file_bytes: int) -> GgufFront:
    """Read a front that is in memory; raises as `read_front`."""
    return parse_front(io.BytesIO(data), path, num_file_bytes)


def parse_front(file: BinaryIO, path: Path, num_file_bytes: int) -> GgufFront:
    """Read a front.

    Args:
        file: at its beginning.
        path: for messages.
        num_file_bytes: of the file.

    Raises:
        BadInputError: it is no GGUF file, or its front is cut short or beyond what one may have.
    """
    reader = _Reader(file, path)
    if (magic := reader.bytes(4)) != _MAGIC:
        raise reader.wrong(f"expected a GGUF file, found one that begins with {magic!r}")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise reader.wrong(f"expected version 3, or 2, found {version}")
    num_tensors, num_fields = reader.number("Q"), reader.number("Q")
    if num_tensors > _MAX_TENSORS or num_fields > _MAX_FIELDS:
        raise reader.wrong(
            f"expected at most {_MAX_TENSORS} tensors and {_MAX_FIELDS} fields, found {num_tensors} and {num_fields}"
        )
    fields: dict[str, int | float | bool | str | GgufArray] = {}
    for _ in range(num_fields):
        key = reader.text()
        if key in fields:
            raise reader.wrong(f"expected each field once, found {shown(key, 80)} twice")
        fields[key] = reader.value(reader.number("I"))
    entries: dict[str, GgufEntry] = {}
    for _ in range(num_tensors):
        name, num_dimensions = reader.text(), reader.number("I")
        if num_dimensions > _MAX_DIMENSIONS or name in entries:
            what = f"{num_dimensions} dimensions" if num_dimensions > _MAX_DIMENSIONS else "it twice"
            raise reader.wrong(f"tensor {shown(name, 80)}: expected it once, of at most 4 dimensions, found {what}")
        shape = tuple(reader.number("Q") for _ in range(num_dimensions))
        entries[name] = GgufEntry(name=name, shape=shape[::-1], kind=reader.number("I"), offset=reader.number("Q"))
    alignment = fields.get(_ALIGNMENT, 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise reader.wrong(f"{_ALIGNMENT}: expected a power of two, found {alignment}")
    return GgufFront(
        fields=fields,
        tensors=tuple(entries.values()),
        num_bytes=reader.place + -reader.place % alignment,
        num_file_bytes=num_file_bytes,
    )


class _Reader:
    """Takes a front apart, and knows where it is."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.place = 0

    def wrong(self, what: str) -> BadInputError:
        """Return an error about the file."""
        return BadInputError(f"{shown(self._path)}: {what}; the file is truncated, corrupt, or no GGUF file")

    def bytes(self, number: int) -> bytes:
        """Take some bytes."""
        self.place += number
        if self.place > MAX_FRONT_BYTES:
            raise self.wrong(f"expected metadata of at most {MAX_FRONT_BYTES} bytes, found more")
        data = self._file.read(number)
        if len(data) < number:
            raise self.wrong("expected metadata up to the first tensor, found the end of the file")
        return data

    def number(self, code: str) -> int:
        """Take a whole number."""
        (found,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        return int(found)

    def text(self) -> str:
        """Take a string."""
        data = self.bytes(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"expected text in UTF-8, found {data[:40]!r}") from error

    def value(self, kind: int) -> int | float | bool | str | GgufArray:
        """Take a value of a field."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self.wrong(f"expected a kind of value that GGUF has, found {kind}")
        found: int | float | bool
        (found,) = struct.unpack(f"<{_SCALARS[kind]}", self.bytes(struct.calcsize(f"<{_SCALARS[kind]}")))
        return found

    def _array(self) -> GgufArray:
        kind, length = self.number("I"), self.number("Q")
        if kind == _STRING:
            for _ in range(length):  # each has a length of eight bytes, so that the bound of the front bounds this
                self.bytes(self.number("Q"))
        elif kind in _SCALARS:
            self.bytes(length * struct.calcsize(f"<{_SCALARS[kind]}"))
        else:
            raise self.wrong(f"expected a list of numbers or strings, found one of kind {kind}")
        return GgufArray(length)
