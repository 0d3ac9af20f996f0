"""Base and adapter bytes: wherever they are, pinned, digested, and brought to a local directory.

Only what a checkpoint needs is brought: safetensors, configs, tokenizer files and chat templates. Other formats of the
same weights are left where they are. A base without safetensors is refused; an adapter that has its weights only in
`adapter_model.bin` is converted, once, in a closed process.
"""

import fnmatch
import hashlib
import json
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import NotFoundError, TransientIOError, UnsupportedError
from jobs.locations import HubRepo, LocalPath, Location, S3Prefix
from workers.files import file_errors, sha256_of
from workers.pickled import CONVERTED_WEIGHTS, PICKLED_WEIGHTS, convert
from workers.scratch import keep_directory
from workers.stored_forms import form_of_files

if TYPE_CHECKING:
    from workers.s3_client import S3Object, S3Store

_SIDECARS = ("LICENSE*", "NOTICE*", "USE_POLICY*", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "tokenizer*")
_MAX_HEADER_BYTES = 100 << 20
"""Largest header that safetensors itself reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint or an adapter in a local directory."""

    location: Location
    """Where it is from; a Hub repository at the commit that was brought."""
    directory: Path
    digest: str
    """64 hexadecimal digits that identify its bytes."""
    parts: "tuple[Source, ...]" = ()
    """The adapters that this one was combined of; empty where it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What a base, or an adapter, consists of."""

    name: str
    config: str
    weights: str
    """Pattern of its safetensors files."""
    duplicates: str | None
    """Pattern of safetensors files that repeat the weights in a form that is not read here."""
    pickled: tuple[str, ...]
    """Patterns of the same weights in pickle files."""
    convertible: str | None
    """The pickle file that stands in for safetensors where there are none."""

    def select(self, names: Iterable[str]) -> list[str]:
        """Return the names, in order, of the files that belong to it, out of all that are at a place."""
        there = frozenset(names)
        wanted = {name for name in there if self.wants(name)}
        if self.convertible in there and not any(name.endswith(".safetensors") for name in wanted):
            wanted.add(self.convertible)
        return sorted(wanted)

    def wants(self, name: str) -> bool:
        """Whether a file belongs to it. Directories hold other formats; of theirs only chat templates are taken."""
        if "/" in name:
            return fnmatch.fnmatchcase(name, "additional_chat_templates/*.jinja")
        if fnmatch.fnmatchcase(name, "*.safetensors"):
            return fnmatch.fnmatchcase(name, self.weights) and not self._repeats(name)
        return _matches(name, _SIDECARS) and not _matches(name, self.pickled)

    def check(self, names: Iterable[str], location: Location) -> None:
        """Check that config and weights are among the files of a location.

        Raises:
            NotFoundError: they are not; the message names what was expected.
            UnsupportedError: there are only pickled weights, of a kind that is not converted.
        """
        there = frozenset(names)
        has_weights = any(name.endswith(".safetensors") or name == self.convertible for name in self.select(there))
        form = form_of_files(there) if self is _BASE else None
        if not has_weights:
            # What its maker calls consolidated is pickled, too, and has other names of tensors besides.
            pickled = sorted(name for name in there if _matches(name, self.pickled) and "consolidated" not in name)
            if pickled:
                raise UnsupportedError(
                    f"{self.name} {location} has its weights only in pickle files ({pickled[0]}), which can run code "
                    "when they are read; re-save it as safetensors"
                )
        if form is not None and not (has_weights and self.config in there):
            raise UnsupportedError(f"{self.name} {location} is {form.words} (found {_some(there)}). {form.advice}")
        if not has_weights:
            raise NotFoundError(f"{self.name} {location} has no {self.weights}; found {_some(there)}")
        if self.config not in there:
            raise NotFoundError(f"{self.name} {location} has no {self.config}; found {_some(there)}")

    def _repeats(self, name: str) -> bool:
        return self.duplicates is not None and fnmatch.fnmatchcase(name, self.duplicates)


_BASE = _Kind(
    name="base",
    config="config.json",
    weights="*.safetensors",
    duplicates="consolidated*.safetensors",  # the release format of some makers, beside the one of transformers
    pickled=("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"),
    convertible=None,
)
_ADAPTER = _Kind(
    name="adapter",
    config="adapter_config.json",
    weights="adapter_model*.safetensors",
    duplicates=None,
    pickled=("adapter_model*.bin",),
    convertible=PICKLED_WEIGHTS,
)


def fetch_base(location: Location, cache: Path) -> Source:
    """Bring a base to a local directory.

    The digest of a local base is taken from names, sizes, times and safetensors headers, and the contents of the other
    files: no weights are read. That of a remote one is taken from what the store says of each file.

    Args:
        location: a directory with `config.json` and safetensors, a prefix, or a repository.
        cache: where bases from S3 are kept; those from a Hub are kept in huggingface_hub's own cache.

    Raises:
        NotFoundError: there is no such place, or a file is missing; the message says what was expected.
        UnsupportedError: there are only pickled weights.
        AuthError, TransientIOError, NoCapacityError, BadInputError: by kind of fault.
    """
    directory, pinned, identity = _bring(_BASE, location, cache)
    return Source(location=pinned, directory=directory, digest=_digest(identity or _look_at_base(directory, pinned)))


def fetch_adapter(location: Location, cache: Path) -> Source:
    """Bring an adapter to a local directory. Its digest is taken from the names and contents of its files.

    One without safetensors has its `adapter_model.bin` converted; the digest stays that of the files as they were.

    Args:
        location: a directory with `adapter_config.json` and `adapter_model.safetensors` or `adapter_model.bin`, a
            prefix, or a repository.
        cache: where adapters from S3 and converted ones are kept; those from a Hub are kept in huggingface_hub's own
            cache.

    Raises:
        As `fetch_base`; as `workers.pickled.convert` for an adapter that is converted.
    """
    directory, pinned, _ = _bring(_ADAPTER, location, cache)
    with file_errors(f"reading adapter {pinned}"):
        contents = _contents(directory)
    digest = _digest(contents)
    if any(name == PICKLED_WEIGHTS for name, _ in contents):
        converted = cache / "sources" / digest
        with file_errors(f"converting adapter {pinned} to {converted}"):
            keep_directory(converted, lambda path: _convert(directory, contents, path))
        directory = converted
    return Source(location=pinned, directory=directory, digest=digest)


def _contents(directory: Path) -> list[tuple[str, str]]:
    """Return what identifies an adapter: name and SHA-256 of each file."""
    return [(path.relative_to(directory).as_posix(), sha256_of(path)) for path in _files(_ADAPTER, directory)]


def _convert(directory: Path, contents: list[tuple[str, str]], target: Path) -> None:
    """Fill a directory with an adapter's files, the weights as safetensors."""
    for name, _ in contents:
        path = target / name
        if name == PICKLED_WEIGHTS:
            convert(directory / name, target / CONVERTED_WEIGHTS)
        else:
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(directory / name, path)
    if _contents(directory) != contents:
        raise TransientIOError(f"adapter {directory} was changed while it was read; it is read anew")


def _bring(kind: _Kind, location: Location, cache: Path) -> tuple[Path, Location, Any]:
    """Return the local directory, the pinned location, and what the store says of the files (None when local)."""
    match location:
        case LocalPath():
            with file_errors(f"reading {kind.name} {location}"):
                if not location.path.is_dir():
                    raise NotFoundError(
                        f"{kind.name} {location} is no directory; expected one with {kind.config} and {kind.weights}"
                    )
                kind.check((path.name for path in location.path.iterdir()), location)
            return location.path, location, None
        case S3Prefix():
            return _bring_from_s3(kind, location, cache)
        case HubRepo():
            return _bring_from_hub(kind, location)


def _bring_from_s3(kind: _Kind, location: S3Prefix, cache: Path) -> tuple[Path, Location, Any]:
    from workers.s3_client import S3Store  # noqa: PLC0415 - loads boto3 only where there is S3

    store = S3Store(location)
    objects = store.objects()
    kind.check(objects, location)
    wanted = [objects[name] for name in kind.select(objects)]
    identity = [(entry.name, entry.etag, entry.num_bytes) for entry in wanted]
    directory = cache / "sources" / _digest(identity)
    with file_errors(f"bringing {kind.name} {location} to {directory}"):
        keep_directory(directory, lambda path: _download(store, wanted, path))
    return directory, location, identity


def _download(store: "S3Store", wanted: list["S3Object"], directory: Path) -> None:
    for entry in wanted:
        path = directory / entry.name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            file.writelines(store.read(entry))


def _bring_from_hub(kind: _Kind, location: HubRepo) -> tuple[Path, Location, Any]:
    from workers.hub_client import HubStore  # noqa: PLC0415 - loads huggingface_hub only where there is a Hub

    store = HubStore(location)
    allowed = [kind.weights, *_SIDECARS]
    ignored = [f"*/{pattern}" for pattern in allowed if pattern != "*.jinja"]
    directory = store.snapshot(allowed, [*ignored, *kind.pickled, *([kind.duplicates] if kind.duplicates else [])])
    commit = directory.name
    names = store.listed(commit) or frozenset(path.name for path in directory.iterdir())
    kind.check(names, location)
    wanted = kind.select(names)
    pinned = HubRepo(location.repo_id, commit)
    if kind.convertible in wanted:
        directory = HubStore(pinned).snapshot([*allowed, kind.convertible], ignored)
    return directory, pinned, [location.repo_id, commit, *wanted]


def _look_at_base(directory: Path, location: Location) -> list[tuple[str, ...]]:
    """Return what identifies a local base: stat and header of each safetensors file, contents of the others."""
    with file_errors(f"reading base {location}"):
        return [
            (path.name, *_look_at_weights(path)) if path.suffix == ".safetensors" else (path.name, sha256_of(path))
            for path in _files(_BASE, directory)
        ]


def _look_at_weights(path: Path) -> tuple[str, str, str]:
    status = path.stat()
    with path.open("rb") as file:
        start = file.read(8)
        # A header that lies about its size is for the reader of checkpoints to refuse; here it is only hashed.
        num_bytes = min(struct.unpack("<Q", start)[0], _MAX_HEADER_BYTES) if len(start) == 8 else 0
        header = hashlib.sha256(start + file.read(num_bytes)).hexdigest()
    return str(status.st_size), str(status.st_mtime_ns), header


def _files(kind: _Kind, directory: Path) -> list[Path]:
    """Return the files of a local directory that belong to a kind, by name."""
    top = [path for path in directory.iterdir() if path.is_file()]
    templates = (directory / "additional_chat_templates").glob("*.jinja")
    names = (path.relative_to(directory).as_posix() for path in (*top, *templates))
    return sorted(directory / name for name in kind.select(names))


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "nothing"
