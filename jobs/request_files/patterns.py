"""Texts that stand for several places: `*` is any part of one name of a folder, `?` one character of it."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jobs.errors import InvalidValueError
from jobs.locations import Elsewhere, Location, parse_location
from jobs.steps import step_of

_WILDCARDS = re.compile(r"[*?]")
_UNFINISHED = "tmp-"
"""What some versions of transformers 4 put before the name of a checkpoint until all of it was there."""
_NUM_FIXED = 2
"""Names that a store needs before the first wildcard: bucket and a part of the prefix, owner and repository."""


class Listing(Protocol):
    """What lies at places, as far as patterns ask for it. All raise AuthError, TransientIOError and so on by fault."""

    def folders(self, place: Location) -> Collection[str]:
        """Return the names of the folders right below a place.

        Raises:
            NotFoundError: there is no such place, where that can be told.
        """
        ...

    def files(self, place: Location) -> Mapping[str, int]:
        """Return names and sizes in bytes of the files right below a place; none where there is no such place."""
        ...

    def start(self, place: Location, name: str, num_bytes: int) -> bytes | None:
        """Return the first bytes of a file, at least so many of those it has; None where files appear whole or not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A place that a pattern stands for."""

    place: Location
    path: str
    """From the root of the pattern."""
    step: int | None
    """The number at the end of the last of its names that stands for a wildcard and ends in one."""

    def below(self, name: str, step: int | None) -> "Match":
        """Return the place of a folder in this one."""
        return Match(place=self.place.folder(name), path=f"{self.path}/{name}" if self.path else name, step=step)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderPattern:
    """A text with wildcards."""

    text: str
    root: Location
    """The place before the first name with a wildcard."""
    names: tuple[str, ...]
    """From there on."""

    @classmethod
    def parse(cls, text: str, relative_to: Path | Elsewhere) -> "FolderPattern":
        """Read a pattern.

        Args:
            text: of which `is_pattern` is true.
            relative_to: what relative paths are taken from.

        Raises:
            InvalidValueError: it is none, or no location comes before the first wildcard.
        """
        scheme = next((each for each in ("s3://", "hf://") if text.startswith(each)), "")
        path, at, revision = text.partition("@") if scheme == "hf://" else (text, "", "")
        names = path.removeprefix(scheme).removesuffix("/").split("/")
        first = next((number for number, name in enumerate(names) if is_pattern(name)), None)
        if first is None:
            raise InvalidValueError("wildcards in the names of folders alone", repr(text))
        if scheme and first < _NUM_FIXED:
            whole = {"s3://": "a bucket and a prefix", "hf://": "a repository with its owner"}[scheme]
            raise InvalidValueError(f"{whole} before the first wildcard", repr(text))
        rest = tuple(names[first:])
        if any(name in ("", ".", "..") or "**" in name for name in rest):
            raise InvalidValueError("names of folders from the first wildcard on, none of them '**'", repr(text))
        # Before a wildcard at the top of the file's own directory there is nothing, and before one of `/*` the root.
        before = scheme + "/".join(names[:first]) + at + revision
        return cls(text=text, root=parse_location(before or ("/" if first else "."), relative_to), names=rest)

    def matches(self, listing: Listing, unfinished: list[Location]) -> Iterator[Match]:
        """Yield the places that the names lead to. Hidden folders match where the pattern begins with a dot, too.

        The last name is not looked up where it has no wildcard: that it is missing is worth telling.

        Args:
            listing: what lies where.
            unfinished: takes the folders that have the name of a checkpoint that is still being written.
        """
        places = [Match(place=self.root, path="", step=None)]
        *way, last = self.names
        for name in way:
            places = [inner for around in places for inner in _inner(around, name, listing, unfinished)]
        if is_pattern(last):
            places = [inner for around in places for inner in _inner(around, last, listing, unfinished)]
        else:
            places = [around.below(last, around.step) for around in places]
        yield from places

    def with_folder(self, folder: str) -> str:
        """Return the text that stands for a folder in each place that this one stands for."""
        path, at, revision = self.text.partition("@") if self.text.startswith("hf://") else (self.text, "", "")
        return f"{path.removesuffix('/')}/{folder}{at}{revision}"


def is_pattern(text: object) -> bool:
    """Whether a value stands for several places where patterns are taken."""
    return isinstance(text, str) and _WILDCARDS.search(text) is not None


def _inner(around: Match, name: str, listing: Listing, unfinished: list[Location]) -> Iterator[Match]:
    """Yield what one name of a pattern stands for below one place."""
    if not is_pattern(name):
        if name in listing.folders(around.place):
            yield around.below(name, around.step)
        return
    looks = re.compile("".join({"*": ".*", "?": "."}.get(each, re.escape(each)) for each in name), re.DOTALL)
    for folder in listing.folders(around.place):
        fits = looks.fullmatch(folder) is not None and (name.startswith(".") or not folder.startswith("."))
        if folder.startswith(f"{_UNFINISHED}checkpoint-"):
            if fits or looks.fullmatch(folder.removeprefix(_UNFINISHED)):
                unfinished.append(around.place.folder(folder))
        elif fits:
            step = step_of(folder)
            yield around.below(folder, around.step if step is None else step)
