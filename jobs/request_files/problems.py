"""What is wrong with a request file: every mistake at once, each with its place, in one line a person can act on."""

import difflib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jobs.errors import BadInputError, InvalidValueError
from jobs.text import shown

_MAX_SHOWN = 80
_MAX_FIELD = 200
_MAX_EXPECTED = 1_000
_MESSAGE_START = "Input should be "


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a request file."""

    file: str
    line: int | None
    """Counted from 1; None when the file as a whole is meant."""
    field: str
    """Path inside the file or the line, such as `requests[3].parity.level`; empty when no field is meant."""
    expected: str
    found: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        field = f" {self.field}:" if self.field else ""
        return f"{place}:{field} expected {self.expected}, found {self.found}"


class RequestFileError(BadInputError):
    """A request file has mistakes; none of its requests is used.

    Args:
        problems: all of them, in the order of the file.
    """

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class ProblemList:
    """Collects the problems of one file.

    A field that many requests share, as defaults and templates are, has one problem, not one for each request: what
    was expected in one place is noted once, with what was found there first.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._problems: dict[tuple[int | None, str, str], Problem] = {}

    def __bool__(self) -> bool:
        return bool(self._problems)

    def __len__(self) -> int:
        return len(self._problems)

    def add(self, line: int | None, field: str, expected: str, found: str) -> None:
        """Note one problem."""
        words = shown(expected, _MAX_EXPECTED), shown(found, _MAX_EXPECTED)
        problem = Problem(shown(self._file), line, shown(field, _MAX_FIELD), *words)
        self._problems.setdefault((line, field, expected), problem)

    def error(self, *, lines: bool = True) -> RequestFileError:
        """Return all problems, in the order of the file, as the error to raise.

        Args:
            lines: whether lines mean something to a person.
        """
        found = sorted(self._problems.values(), key=lambda problem: problem.line or 0)
        return RequestFileError(tuple(each if lines else replace(each, line=None) for each in found))


def show(value: Any) -> str:
    """Return a value as a person would recognize it from the file, cut to a readable length."""
    match value:
        case None:
            text = "nothing"
        case dict():
            text = "a mapping"
        case list() | tuple():
            text = "a list" if value else "an empty list"
        case str():
            text = repr(value)
        case _:
            text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def closest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that the writer of `name` probably meant."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def known_name(name: str, known: Collection[str]) -> str:
    """Return what to expect in place of an unknown name: the closest known one, or all of them."""
    meant = closest(name, known)
    return f"one of {', '.join(sorted(known))}" if meant is None else f"a known field (did you mean '{meant}'?)"


def mistakes(error: ValidationError) -> Iterator[ErrorDetails]:
    """Yield pydantic's findings, without those that only follow from others."""
    details = error.errors(include_url=False)
    places = {detail["loc"][:length] for detail in details for length in range(len(detail["loc"]))}
    for detail in details:
        # Pydantic calls a list too short when its items are wrong; the items are reported themselves.
        if not (detail["type"] == "too_short" and detail["loc"] in places):
            yield detail


def expectation(detail: ErrorDetails) -> tuple[str, str]:
    """Return what one of pydantic's findings expected and found, in words."""
    context = detail.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, InvalidValueError):
        return cause.expected, cause.found
    found = show(detail["input"])
    match detail["type"]:
        case "missing":
            expected, found = context.get("expected", "a value"), "nothing"
        case "model_type" | "dict_type":
            expected = "a mapping"
        case "tuple_type" | "list_type":
            expected = 'a list such as ["a", "b"]'
        case "string_type":
            expected = "text (in quotes where it looks like something else)"
        case "too_short":
            expected, found = f"at least {context['min_length']} item(s)", str(context["actual_length"])
        case "string_too_short":
            expected = f"at least {context['min_length']} character(s)"
        case _:
            expected = detail["msg"].removeprefix(_MESSAGE_START).split(", unable to parse", maxsplit=1)[0]
    return expected, found
