"""Where a fleet may read from and write to: an operator's lists of places, held against what requests name.

Every submitter makes workers read and write with the workers' credentials. On a fleet that several share these lists
say how far that goes. A request is compared by its text when it is submitted, and on the worker again: there with the
links of local paths followed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from jobs.errors import BadInputError, InvalidValueError
from jobs.locations import HubRepo, LocalPath, Location, S3Prefix, parse_location
from jobs.request import MergeRequest

_EXPECTED = (
    "/path, s3://bucket, s3://bucket/prefix, hf://owner/*, hf://owner/name, hf://owner/name/folder or either of these "
    "with @revision"
)
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Pattern:
    """A place and all below it.

    | text | covers |
    |---|---|
    | `/path` | the directory and everything below |
    | `s3://bucket`, `s3://bucket/prefix` | the whole bucket; the prefix and all below it, `prefix-2` is not |
    | `hf://owner/*` | all repositories of an owner, at any revision |
    | `hf://owner/name`, `hf://owner/name@revision` | one repository with its folders, at any revision; at this one |
    | `hf://owner/name/folder`, with `@revision` or not | that folder and all below it, `folder-2` is not |

    A `/*` at the end of a path, a prefix, a repository or a folder may be written and changes nothing.
    """

    text: str
    kind: Literal["local", "s3", "hf"]
    names: tuple[str, ...]
    """Bucket and parts of the prefix; owner and name of the repository and parts of the folder, as far as given; parts
    of the path."""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a pattern.

        Raises:
            InvalidValueError: it is none.
        """
        stem = text.removesuffix("/*")
        if not stem or "*" in stem:
            raise InvalidValueError(_EXPECTED, repr(text))
        if stem.startswith("hf://"):
            if stem != text and "/" not in stem.removeprefix("hf://"):
                owner = parse_location(f"{stem}/name")
                assert isinstance(owner, HubRepo)
                return cls(text, "hf", (owner.repo_id.partition("/")[0],))
            if stem != text and "@" in stem:
                raise InvalidValueError(_EXPECTED, repr(text))  # the revision ends a location
            place = parse_location(stem)
            assert isinstance(place, HubRepo)
            return cls(text, "hf", _parts(place), place.revision if "@" in stem else None)
        if stem.startswith("s3://"):
            bucket, _, prefix = stem.removeprefix("s3://").rstrip("/").partition("/")
            place = parse_location(f"s3://{bucket}/{prefix or 'any'}")
            assert isinstance(place, S3Prefix)
            return cls(text, "s3", (bucket, *(prefix.split("/") if prefix else ())))
        if not stem.startswith(("/", "~")):
            raise InvalidValueError(_EXPECTED, repr(text))
        place = parse_location(stem)
        assert isinstance(place, LocalPath)
        return cls(text, "local", place.path.parts)

    def covers(self, location: Location, *, follow_links: bool) -> bool:
        """Whether a location is this place or lies below it.

        Args:
            location: as a request names it.
            follow_links: whether local paths, this one's too, are compared by what links lead to.
        """
        match location:
            case LocalPath(path):
                mine = Path(*self.names) if self.kind == "local" else None
                if mine is None or not path.is_relative_to(mine):
                    return False
                return not follow_links or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(mine))
            case S3Prefix(bucket, prefix):
                return self.kind == "s3" and (bucket, *prefix.split("/"))[: len(self.names)] == self.names
            case HubRepo():
                parts = _parts(location)
                is_single = len(self.names) == 1 and not self.text.endswith("/*")  # a repository without an owner
                parts = _parts(location)
                fits = parts == self.names if is_single else len(parts) > 1 and parts[: len(self.names)] == self.names
                return self.kind == "hf" and fits and self.revision in (None, location.revision)


def _parts(place: HubRepo) -> tuple[str, ...]:
    """Return owner, name and folders of a place on the Hub."""
    return (*place.repo_id.split("/"), *(place.path.split("/") if place.path else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What requests may name. None allows every place. Can be pickled."""

    sources: tuple[Pattern, ...] | None = None
    """Of bases and adapters."""
    destinations: tuple[Pattern, ...] | None = None

    def refusals(
        self, request: MergeRequest, *, follow_links: bool
    ) -> Iterator[tuple[tuple[int | str, ...], str, str]]:
        """Yield each place of a request that is not allowed: path of its field, what was expected, what was found."""
        sources: list[tuple[tuple[int | str, ...], Location]] = [(("base",), request.base)]
        if request.adapter is not None:
            sources.append((("adapter",), request.adapter))
        sources += [
            (("adapters", number, "adapter"), each.adapter) for number, each in enumerate(request.adapters or ())
        ]
        for path, location in sources:
            if not _is_allowed(self.sources, location, follow_links=follow_links):
                yield path, _source_words(self.sources), f"'{location}'"
        if not _is_allowed(self.destinations, request.destination, follow_links=follow_links):
            expected = f"a destination that this fleet writes to: {_shown(self.destinations)}"
            yield ("destination",), expected, f"'{request.destination}'"

    def refusal_of_source(self, location: Location) -> str | None:
        """Return what is expected in the place of a source that is not allowed, by its text; None when it is."""
        return None if _is_allowed(self.sources, location, follow_links=False) else _source_words(self.sources)

    def check(self, request: MergeRequest) -> None:
        """Refuse a request that names a place which is not allowed, wherever links lead to on this machine.

        Raises:
            BadInputError: lists every such place.
        """
        refused = [
            f"{'.'.join(map(str, path))}: expected {expected}, found {found}, links followed"
            for path, expected, found in self.refusals(request, follow_links=True)
        ]
        if refused:
            raise BadInputError("; ".join(refused))


def _is_allowed(patterns: tuple[Pattern, ...] | None, location: Location, *, follow_links: bool) -> bool:
    return patterns is None or any(each.covers(location, follow_links=follow_links) for each in patterns)


def _source_words(patterns: tuple[Pattern, ...] | None) -> str:
    return f"a source that this fleet reads: {_shown(patterns)}"


def _shown(patterns: tuple[Pattern, ...] | None) -> str:
    texts = [each.text for each in patterns or ()]
    more = f" and {len(texts) - _MAX_SHOWN} more" if len(texts) > _MAX_SHOWN else ""
    return ", ".join(texts[:_MAX_SHOWN]) + more
