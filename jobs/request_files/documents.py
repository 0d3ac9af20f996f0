"""Request files as trees of values that know the line they stand on; the readers of JSON lines and CSV.

YAML becomes the same tree in `jobs/request_files/yaml_tree.py`.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from jobs.request_files.problems import ProblemList, known_name

MAX_DEPTH = 50
MAX_DIGITS = 100
"""Of a whole number."""

MAX_VALUES = 600_000
"""Values in one file, counted after YAML aliases are followed: a small file can stand for a huge one."""

Value: TypeAlias = "str | int | float | bool | tuple[Node, ...] | dict[str, Node] | None"


@dataclass(frozen=True, slots=True)
class Node:
    """One value of a request file and its place."""

    value: Value
    line: int
    """Counted from 1; for a field of a mapping, the line of its name."""
    field: str
    """Path inside the file or the line; empty at the top."""

    def plain(self) -> Any:
        """Return the value without places. Fields that hold null are left out: null stands for the built-in default."""
        match self.value:
            case dict() as fields:
                return {name: node.plain() for name, node in fields.items() if node.value is not None}
            case tuple() as items:
                return [node.plain() for node in items]
            case scalar:
                return scalar

    def at(self, path: Iterable[int | str]) -> "Node":
        """Return the node at a path, or the deepest one on the way there."""
        node = self
        for step in path:
            match node.value:
                case dict() as fields if step in fields:
                    node = fields[str(step)]
                case tuple() as items if isinstance(step, int) and step < len(items):
                    node = items[step]
                case _:
                    break
        return node

    def overlaid(self, top: "Node") -> "Node":
        """Return `top` with what it leaves out taken from this node; mappings are overlaid field by field."""
        if not (isinstance(self.value, dict) and isinstance(top.value, dict)):
            return top
        fields = dict(self.value)
        for name, node in top.value.items():
            fields[name] = fields[name].overlaid(node) if name in fields else node
        return Node(fields, top.line, top.field)


class DocumentTooLargeError(Exception):
    """A file holds, or stands for, more than this process is willing to hold. The message says what of.

    Args:
        limit: what is allowed, in words.
    """


class Limits:
    """Counts the values of one file while it is read."""

    def __init__(self) -> None:
        self._num_values = 0

    def count(self, depth: int) -> None:
        """Note one more value.

        Args:
            depth: lists and mappings around it.

        Raises:
            DocumentTooLargeError: it is one too many, or too deep.
        """
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise DocumentTooLargeError(f"at most {MAX_VALUES} values, aliases followed")
        if depth > MAX_DEPTH:
            raise DocumentTooLargeError(f"values nested at most {MAX_DEPTH} deep")


def joined(field: str, name: str) -> str:
    """Return the path of the field `name` of what stands at the path `field`."""
    return f"{field}.{name}" if field else name


class _Pairs(list[tuple[str, Any]]):
    """The fields of a JSON object as written, repeated ones included."""


def whole_number(text: str, base: int = 10) -> int:
    """Return a whole number; one of thousands of digits takes minutes to read, and cannot be shown.

    Raises:
        ValueError: it is none, or has too many digits.
    """
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text, base)


def _parse_json(text: str, *, strict: bool = True) -> Any:
    """Parse JSON; objects become `_Pairs`.

    Args:
        text: the document.
        strict: whether text in quotes may not go over several lines.

    Raises:
        json.JSONDecodeError: it is no JSON.
        UnicodeEncodeError: an escape stands for half a character, which no store could keep.
        ValueError, RecursionError: numbers of thousands of digits, nesting of thousands of levels.
    """
    value = json.loads(text, object_pairs_hook=_Pairs, strict=strict, parse_int=whole_number)
    json.dumps(value, ensure_ascii=False).encode()
    return value


class _JsonTree:
    """Turns the values of one JSON line into nodes."""

    def __init__(self, line: int, limits: Limits, problems: ProblemList) -> None:
        self._line = line
        self._limits = limits
        self._problems = problems

    def build(self, value: Any, field: str = "", depth: int = 0) -> Node:
        self._limits.count(depth)
        if isinstance(value, _Pairs):
            fields: dict[str, Node] = {}
            for name, item in value:
                child = joined(field, name)
                if name in fields:
                    self._problems.add(self._line, child, "each field once", "it again")
                fields[name] = self.build(item, child, depth + 1)
            return Node(fields, self._line, field)
        if isinstance(value, list):
            items = tuple(self.build(item, f"{field}[{index}]", depth + 1) for index, item in enumerate(value))
            return Node(items, self._line, field)
        return Node(value, self._line, field)


def read_jsonl(text: str, problems: ProblemList) -> Iterator[Node]:
    """Yield the objects of a JSON lines file; blank lines and lines that start with `#` are skipped.

    Raises:
        DocumentTooLargeError: the file is beyond the limits.
    """
    limits = Limits()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            value = _parse_json(line)
        except json.JSONDecodeError as error:
            problems.add(number, "", "a JSON object", f"a mistake at column {error.colno}: {error.msg}")
        except UnicodeEncodeError:
            problems.add(number, "", "text that is valid Unicode", "half of a surrogate pair")
        except (ValueError, RecursionError) as error:
            problems.add(number, "", "a JSON object of reasonable values", str(error))
        else:
            yield _JsonTree(number, limits, problems).build(value)


def read_json(text: str, problems: ProblemList) -> Node | None:
    """Return a JSON document, or None when it is none. Its values have no lines of their own: all are on the first.

    Raises:
        DocumentTooLargeError: it is beyond the limits.
    """
    try:
        value = _parse_json(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        problems.add(None, "", "a JSON document", f"a mistake at {where}: {error.msg}")
    except UnicodeEncodeError:
        problems.add(None, "", "text that is valid Unicode", "half of a surrogate pair")
    except (ValueError, RecursionError) as error:
        problems.add(None, "", "a JSON document of reasonable values", str(error))
    else:
        return _JsonTree(1, Limits(), problems).build(value)
    return None


def read_csv(text: str, columns: Mapping[str, bool], problems: ProblemList) -> Iterator[Node]:
    """Yield the rows of a CSV file. Dots in column names stand for nesting; an empty cell leaves its field out.

    Args:
        text: the file; its first row names the columns.
        columns: the names allowed, and whether a cell of that column is a JSON list. `labels.*` stands for any
            name after the dot.
        problems: takes every mistake in the form of the file.

    Raises:
        DocumentTooLargeError: the file is beyond the limits.
    """
    limits = Limits()
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        paths = [_column_path(name, columns) for name in header]
        for index, (name, path) in enumerate(zip(header, paths, strict=True)):
            if name in header[:index]:
                problems.add(1, name, "each column once", "it again")
            elif path is None:
                problems.add(1, name, known_name(name, columns), repr(name))
        # A field that no row has is missing in the header: noted there, once.
        absent = {name: Node(None, 1, name) for name in columns if "." not in name and name not in header}
        line = rows.line_num + 1
        for cells in rows:
            if any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    problems.add(line, "", f"{len(header)} cells, as in the header", str(len(cells)))
                row = dict(absent)
                for name, path, padded in zip(header, paths, cells, strict=False):
                    if path is not None and (cell := padded.strip()):
                        limits.count(len(path))
                        node = _list_cell(cell, line, name, limits, problems) if columns.get(name) else None
                        _place(row, path, node or Node(cell, line, name))
                yield Node(row, line, "")
            line = rows.line_num + 1
    except csv.Error as error:
        problems.add(rows.line_num, "", "valid CSV", f"a mistake: {error}")


def _column_path(name: str, columns: Mapping[str, bool]) -> tuple[str, ...] | None:
    """Return the fields a column name stands for, outermost first; None for an unknown column."""
    if name in columns:
        return tuple(name.split("."))
    parent, _, rest = name.partition(".")
    return (parent, rest) if rest and f"{parent}.*" in columns else None


def _place(fields: dict[str, Node], path: tuple[str, ...], node: Node) -> None:
    """Put a node where its path says, making the mappings on the way."""
    for depth, name in enumerate(path[:-1], start=1):
        inner = fields.setdefault(name, Node({}, node.line, ".".join(path[:depth]))).value
        assert isinstance(inner, dict)
        fields = inner
    fields[path[-1]] = node


def _list_cell(cell: str, line: int, field: str, limits: Limits, problems: ProblemList) -> Node | None:
    """Return the list in a cell, or None when it holds no JSON list: then its text is refused by the field itself."""
    try:
        node = _JsonTree(line, limits, problems).build(_parse_json(cell, strict=False), field)
    except (ValueError, RecursionError):
        return None
    return node if isinstance(node.value, tuple) else None
