"""Typed places: a local path, an S3 prefix, a revision of a Hub repository or a folder in one.

A location is written as one string (`/data/base`, `s3://bucket/prefix`, `hf://org/name@revision`,
`hf://org/name/folder@revision`) and is parsed once, at the edge. Arbitrary URLs are refused.
"""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, ValidationInfo, WithJsonSchema

from jobs.errors import InvalidValueError

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and bytes of a command line that are no UTF-8."""
_SCHEME = re.compile(r"(s3|hf):", re.IGNORECASE)
"""What a path does not begin with, but a mistyped location does."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REPO_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FOLDER_PART = re.compile(r"[^@*?/]+")
"""Of a folder in a repository; `@` begins the revision, and wildcards stand for several places, not for one."""
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_NO_OWNERS = frozenset({"datasets", "models", "spaces"})
"""What other tools write before the owner of a repository; the Hub gives no one these names."""


@dataclass(frozen=True, slots=True)
class LocalPath:
    """A directory on this machine or on a shared filesystem; always absolute."""

    path: Path

    @property
    def name(self) -> str:
        """The last component: what a person would call this place."""
        return self.path.name

    def child(self, name: str) -> "LocalPath":
        """Return the place `name` below this one."""
        return LocalPath(self.path / name)

    def folder(self, path: str) -> "LocalPath":
        """Return the folder at a path below this one."""
        return LocalPath(self.path / path)

    def is_inside(self, other: "Location") -> bool:
        """Whether this place is `other` or lies below it."""
        # As text, which is normalized: of tens of thousands of requests, pathlib takes seconds.
        return isinstance(other, LocalPath) and f"{str(self).rstrip('/')}/".startswith(f"{str(other).rstrip('/')}/")

    def ancestors(self) -> "tuple[LocalPath, ...]":
        """Return the places that this one lies inside of, nearest first."""
        return tuple(LocalPath(path) for path in self.path.parents)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class S3Prefix:
    """Everything below one prefix of a bucket; the prefix has no leading or trailing slash."""

    bucket: str
    prefix: str

    @property
    def name(self) -> str:
        """The last component: what a person would call this place."""
        return self.prefix.rpartition("/")[2]

    def child(self, name: str) -> "S3Prefix":
        """Return the place `name` below this one."""
        return S3Prefix(self.bucket, f"{self.prefix}/{name}")

    def folder(self, path: str) -> "S3Prefix":
        """Return the folder at a path below this one."""
        return S3Prefix(self.bucket, f"{self.prefix}/{path}")

    def is_inside(self, other: "Location") -> bool:
        """Whether this place is `other` or lies below it."""
        return (
            isinstance(other, S3Prefix)
            and self.bucket == other.bucket
            and f"{self.prefix}/".startswith(f"{other.prefix}/")
        )

    def ancestors(self) -> "tuple[S3Prefix, ...]":
        """Return the prefixes that this one lies inside of, nearest first; a bucket as a whole is none."""
        parts = self.prefix.split("/")
        return tuple(S3Prefix(self.bucket, "/".join(parts[:length])) for length in range(len(parts) - 1, 0, -1))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A model repository on the Hub at a revision (branch, tag or commit), or a folder in it."""

    repo_id: str
    revision: str = "main"
    path: str = ""
    """Of the folder, without slashes at its ends; empty for the repository as a whole."""

    @property
    def name(self) -> str:
        """The last component: that of the folder, or the repository's own name, without its owner."""
        return (self.path or self.repo_id).rpartition("/")[2]

    def child(self, name: str) -> "HubRepo":
        """Return the repository `<repo>-<name>`, as no repository has folders of releases; of a folder, one in it."""
        return self.folder(name) if self.path else HubRepo(f"{self.repo_id}-{name}", self.revision)

    def folder(self, path: str) -> "HubRepo":
        """Return the folder at a path below this one."""
        return HubRepo(self.repo_id, self.revision, f"{self.path}/{path}" if self.path else path)

    def is_inside(self, other: "Location") -> bool:
        """Whether this place is `other`, or a folder below it at the same revision."""
        return (
            isinstance(other, HubRepo)
            and (self.repo_id, self.revision) == (other.repo_id, other.revision)
            and (not other.path or f"{self.path}/".startswith(f"{other.path}/"))
        )

    def ancestors(self) -> "tuple[HubRepo, ...]":
        """Return the places that this one lies inside of, nearest first; a repository lies inside of none."""
        parts = self.path.split("/") if self.path else []
        return tuple(
            HubRepo(self.repo_id, self.revision, "/".join(parts[:length])) for length in reversed(range(len(parts)))
        )

    def __str__(self) -> str:
        folder = f"/{self.path}" if self.path else ""
        return f"hf://{self.repo_id}{folder}@{self.revision}"


Location = LocalPath | S3Prefix | HubRepo
_SLASHES_OF_REPO = 3
"""In `hf://owner/name`."""


def enclosing(text: str) -> Iterator[str]:
    """Yield the places that a location lies inside of, nearest first, all as text: cheap for very many.

    Args:
        text: a location as it writes itself.
    """
    if text.startswith("hf://"):
        # Of a repository, which lies inside of none, there is nothing to cut off.
        folder, _, revision = text.partition("@")
        while folder.count("/") > _SLASHES_OF_REPO:
            folder = folder.rpartition("/")[0]
            yield f"{folder}@{revision}"
        return
    root = text.index("/", len("s3://")) + 1 if text.startswith("s3://") else 1
    while (cut := text.rfind("/", root)) > 0:
        text = text[:cut]
        yield text
    if text.startswith("/") and text != "/":
        yield "/"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The machine that a text comes from, when it is not this one: its home directories are not known here."""

    directory: Path | None
    """Absolute; what relative paths are taken from. Without one they are refused."""


def parse_location(text: str, relative_to: Path | Elsewhere | None = None) -> Location:
    """Parse a location.

    Args:
        text: `/path`, `relative/path`, `s3://bucket/prefix` or `hf://owner/name[/folder][@revision]`.
        relative_to: directory that relative paths are taken from; the working directory when None.

    Returns:
        The typed location; local paths are made absolute and normalized, but not resolved through links.

    Raises:
        InvalidValueError: the text is no location; says what was expected.
    """
    if not text or text != text.strip() or _UNPRINTABLE.search(text):
        raise InvalidValueError("a path, s3://bucket/prefix or hf://owner/name@revision", repr(text))
    if isinstance(relative_to, Elsewhere):
        relative_to = _directory_of(text, relative_to)
    elif text.startswith("~"):
        return LocalPath(normal_path(_from_home(text), relative_to))
    if text.startswith("/"):
        return _parse(text, "/")
    return _parse(text, os.path.join(os.getcwd(), relative_to or ""))  # noqa: PTH109, PTH118


@functools.lru_cache(maxsize=4096)
def _parse(text: str, directory: str) -> Location:
    """Parse a location that names no home; a bulk file names the same base and adapters again and again."""
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise InvalidValueError("s3://bucket/prefix with a valid bucket name", repr(text))
        parts = prefix.rstrip("/").split("/") if prefix else []
        if not parts or any(part in ("", ".", "..") for part in parts):
            raise InvalidValueError("s3://bucket/prefix with a prefix free of empty, '.' and '..' parts", repr(text))
        return S3Prefix(bucket, "/".join(parts))
    if text.startswith("hf://"):
        return _parse_hub(text)
    if "://" in text or _SCHEME.match(text):
        raise InvalidValueError("a path, s3://bucket/prefix or hf://owner/name@revision", f"another URL, {text!r}")
    return LocalPath(normal_path(text, directory))


def _parse_hub(text: str) -> HubRepo:
    place, _, revision = text.removeprefix("hf://").partition("@")
    owner, *rest = parts = (place.removesuffix("/") if place.count("/") > 1 else place).split("/")
    if len(parts) > 2 and owner in _NO_OWNERS:
        expected = "hf://owner/name/folder@revision of a model repository, without the kind of repository before it"
        raise InvalidValueError(expected, repr(text))
    repo, folders = parts[:2], rest[1:]
    if not all(_REPO_PART.fullmatch(part) for part in repo):
        raise InvalidValueError("hf://owner/name or hf://owner/name/folder, with @revision or not", repr(text))
    if any(part in (".", "..") or not _FOLDER_PART.fullmatch(part) for part in folders):
        expected = "a folder of the repository free of empty, '.' and '..' parts, of '*' and '?'"
        raise InvalidValueError(expected, repr(text))
    if "@" in text and not _REVISION.fullmatch(revision):
        raise InvalidValueError("a branch, tag or commit after '@', which ends the text", repr(text))
    return HubRepo("/".join(repo), revision or "main", "/".join(folders))


def _directory_of(text: str, origin: Elsewhere) -> Path | None:
    """Return what a path that was written on another machine is taken from."""
    if text.startswith("~"):
        raise InvalidValueError("an absolute path: '~' is a home directory of another machine", repr(text))
    is_relative = not text.startswith("/") and "://" not in text and not _SCHEME.match(text)
    if is_relative and origin.directory is None:
        raise InvalidValueError("an absolute path, s3://bucket/prefix or hf://owner/name@revision", repr(text))
    return origin.directory


def _from_home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InvalidValueError("the home directory of a user of this machine after '~'", repr(text)) from None


def normal_path(path: str | Path, relative_to: str | Path | None = None) -> Path:
    """Return the one path that stands for a place: absolute, normalized, not resolved through links.

    POSIX leaves the meaning of two leading slashes to the system, so `normpath` keeps them; on Linux they are one.

    Args:
        path: absolute or relative.
        relative_to: directory that a relative path is taken from; the working directory when None.
    """
    whole = os.fspath(path)
    if not whole.startswith("/"):
        whole = os.path.join(os.getcwd(), relative_to or "", whole)  # noqa: PTH109, PTH118
    return Path("/" + os.path.normpath(whole).lstrip("/"))


def _validate(value: Any, info: ValidationInfo) -> Location:
    if isinstance(value, LocalPath | S3Prefix | HubRepo):
        return value
    if isinstance(value, str):
        return parse_location(value, (info.context or {}).get("relative_to"))
    raise InvalidValueError("a location as text", type(value).__name__)


# Relative paths are taken from what the validation context says, `{"relative_to": Path | Elsewhere}`, where it does.
LocationField = Annotated[
    Location,
    BeforeValidator(_validate),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string"}),
]
