"""Base and adapter bytes: wherever they are, pinned, digested, and brought to a local directory.

Only what a checkpoint needs is brought: safetensors, and what `belongings.py` lists. Other formats of the same
weights are left where they are. An adapter in several files, or with pickled ones, is gathered into one safetensors
file, once, and so is a base that has pickled weights alone; pickled files are converted in a closed process.
"""

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import NotFoundError, TransientIOError, UnsupportedError
from jobs.locations import HubRepo, LocalPath, Location, S3Prefix
from jobs.text import shown
from workers.files.checkpoint import read_shard
from workers.files.foreign import copy_foreign, foreign_sha256
from workers.files.local import FileState, file_errors
from workers.files.scratch import keep_directory
from workers.sources.adapter_files import (
    GATHERED_VERSION,
    WeightFiles,
    gather,
    read_origins,
    read_reordered,
    weight_files,
)
from workers.sources.belongings import is_weights
from workers.sources.foreign_adapters import MLX_WEIGHTS, foreign_kind
from workers.sources.listing import ListedFiles, check_description
from workers.sources.pickled_bases import contents_of, pickled_weights, unpickle

if TYPE_CHECKING:
    from workers.sources.s3_client import S3Object, S3Store
from workers.sources.kinds import ADAPTER, BASE, Kind, files_of, local_names
from workers.sources.local_digest import look_at_base


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
    beside: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Of a gathered adapter: for each tensor that is not the adapter's own, the file it came from."""
    reordered: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Of a gathered adapter that torchtune exported: tensors of its own copy that have their rows in another order."""
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What a person should know of how it was brought here."""
    states: Mapping[Path, FileState] = field(default_factory=dict, compare=False, repr=False)
    """Of its files, from before its digest was taken: what is read while they stay is what the digest stands for."""

    def check_unchanged(self) -> None:
        """Check that no file was written to, or put in the place of another, since the digest was taken.

        Raises:
            TransientIOError: one was; the next attempt reads all of it anew.
        """
        for source in (self, *self.parts):
            for path, state in source.states.items():
                try:
                    same = FileState.of(path.stat()) == state
                except OSError:
                    same = False
                if not same:
                    raise TransientIOError(
                        f"{shown(path)} was changed while it was read, so nothing that was made of it is used; "
                        f"{source.location} is read anew"
                    )


def fetch_base(location: Location, cache: Path) -> Source:
    """Bring a base to a local directory.

    The digest of a local base is taken from names, sizes, times and headers of its safetensors, from samples of their
    bytes in all tensors (in some, where there are thousands), and from the contents of the other files. That of a
    remote one is taken from what the store says of each file.

    Args:
        location: a directory with `config.json` and safetensors, a prefix, a repository or a folder in one.
        cache: where bases from S3 are kept; those from a Hub are kept in huggingface_hub's own cache.

    Raises:
        NotFoundError: there is no such place, or a file is missing; the message says what was expected.
        UnsupportedError: there are only pickled weights, of a kind that is not converted.
        AuthError, TransientIOError, NoCapacityError, BadInputError: by kind of fault.
    """
    directory, pinned, identity = _bring(BASE, location, cache)
    states = _states(BASE, directory)
    names = {path.name for path in states if path.parent == directory}
    if not any(name.endswith(".safetensors") for name in names) and (pickled := pickled_weights(names)):
        return _unpickled(directory, pinned, identity, pickled, cache)
    digest = _digest(identity or look_at_base(directory, pinned))
    return Source(location=pinned, directory=directory, digest=digest, states=states)


def _unpickled(directory: Path, pinned: Location, identity: Any, pickled: tuple[str, ...], cache: Path) -> Source:
    """Return a base with its pickled weights in safetensors, written once; a local one's digest is that of contents."""
    files = [path.relative_to(directory).as_posix() for path in files_of(BASE, directory)]
    looked = [(name, repr(FileState.of((directory / name).stat()))) for name in files]
    target = cache / "unpickled" / _digest(identity or [str(directory), *looked])
    others = [name for name in files if name not in pickled]
    with file_errors(f"converting base {pinned} in {target}", target):
        keep_directory(target, lambda path: unpickle(directory, pickled, others, path))
        digest = _digest(identity or contents_of(target))
    told = f"the base's weights are pickled ({pickled[0]}): what a closed process read of them was merged"
    return Source(location=pinned, directory=target, digest=digest, notes=(told,), states=_states(BASE, target))


def fetch_adapter(location: Location, cache: Path) -> Source:
    """Bring an adapter to a local directory. Its digest is taken from the names and contents of its files.

    Weights in several files, or in pickled ones, are gathered into one safetensors file; the digest stays that of the
    files as they were.

    Args:
        location: a directory with `adapter_config.json` and weights as PEFT saves them, a prefix, a repository or a
            folder in one.
        cache: where adapters from S3 and gathered ones are kept; those from a Hub are kept in huggingface_hub's own
            cache.

    Raises:
        As `fetch_base`; as `workers.sources.adapter_files.gather` for an adapter that is gathered.
    """
    if isinstance(location, LocalPath):
        _check_kind(location)
    directory, pinned, _ = _bring(ADAPTER, location, cache)
    states = _states(ADAPTER, directory)
    with file_errors(f"reading adapter {pinned}"):
        contents = _contents(directory)
    digest = _digest(contents)
    files = weight_files((name for name, _ in contents), f"adapter {pinned}")
    if files.plain:
        return Source(location=pinned, directory=directory, digest=digest, states=states)
    gathered = cache / "gathered" / f"{digest}-{GATHERED_VERSION}"
    with file_errors(f"gathering adapter {pinned} in {gathered}", gathered):
        keep_directory(gathered, lambda path: _gather(directory, contents, files, path))
        beside, reordered = read_origins(gathered), read_reordered(gathered)
    states = _states(ADAPTER, gathered)
    return Source(location=pinned, directory=gathered, digest=digest, beside=beside, reordered=reordered, states=states)


def _check_kind(location: LocalPath) -> None:
    """Say what the weights of a directory are that has none of PEFT's, where their names tell.

    Raises:
        UnsupportedError: they tell.
    """
    if any(location.path.glob("adapter_model*")) or (location.path / MLX_WEIGHTS).exists():
        return
    for path in sorted(path for path in location.path.glob("*.safetensors") if path.is_file())[:1]:
        if found := foreign_kind(spec.name for spec in read_shard(path).tensors):
            tensor, kind, advice = found
            raise UnsupportedError(f"{path}: tensor {tensor}: this is {kind}, not one of PEFT; {advice}")


def _contents(directory: Path) -> list[tuple[str, str]]:
    """Return what identifies an adapter: name and SHA-256 of each file."""
    files = [(path, path.relative_to(directory)) for path in files_of(ADAPTER, directory)]
    for path, _ in files:
        if path.suffix == ".safetensors":
            read_shard(path)  # what is no such file, and may be a hole of a terabyte, is not read for its digest
    return [(name.as_posix(), foreign_sha256(path, num_parts=len(name.parts))) for path, name in files]


def _gather(directory: Path, contents: list[tuple[str, str]], files: WeightFiles, target: Path) -> None:
    """Fill a directory with an adapter's files, the weights in one of them."""
    gather(directory, files, target)
    for name, _ in contents:
        if name not in {*files.own, *files.beside} and not name.endswith(".index.json"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy_foreign(directory / name, target / name, num_parts=name.count("/") + 1)
    if _contents(directory) != contents:
        raise TransientIOError(f"adapter {directory} was changed while it was read; it is read anew")


def _bring(kind: Kind, location: Location, cache: Path) -> tuple[Path, Location, Any]:
    """Return the local directory, the pinned location, and what the store says of the files (None when local)."""
    match location:
        case LocalPath():
            with file_errors(f"reading {kind.name} {location}"):
                if not location.path.is_dir():
                    raise NotFoundError(
                        f"{kind.name} {location} is no directory; expected one with {kind.config} and {kind.weights}"
                    )
                kind.check(local_names(kind, location.path), location)
            return location.path, location, None
        case S3Prefix():
            return _bring_from_s3(kind, location, cache)
        case HubRepo():
            return _bring_from_hub(kind, location)


def _bring_from_s3(kind: Kind, location: S3Prefix, cache: Path) -> tuple[Path, Location, Any]:
    from workers.sources.s3_client import S3Store  # noqa: PLC0415 - loads boto3 only where there is S3

    store = S3Store(location)
    objects = store.objects()
    kind.check(objects, location)

    def read(name: str) -> bytes:
        check_description(f"{location}/{name}", objects[name].num_bytes)
        return b"".join(store.read(objects[name]))

    wanted = [objects[name] for name in kind.select(ListedFiles(location, frozenset(objects), read))]
    identity = [(entry.name, entry.etag, entry.num_bytes) for entry in wanted]
    directory = cache / "sources" / _digest(identity)
    with file_errors(f"bringing {kind.name} {location} to {directory}", directory):
        keep_directory(directory, lambda path: _download(store, wanted, path))
    return directory, location, identity


def _download(store: "S3Store", wanted: list["S3Object"], directory: Path) -> None:
    for entry in wanted:
        path = directory / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.writelines(store.read(entry))


def _bring_from_hub(kind: Kind, location: HubRepo) -> tuple[Path, Location, Any]:
    from workers.sources.hub_client import HubStore  # noqa: PLC0415 - loads huggingface_hub only where there is a Hub

    store = HubStore(location)
    # A look at the commit first, as some of its files say which others belong to them.
    snapshot = store.snapshot([glob.escape(store.file(kind.config))], [])
    commit = snapshot.name
    pinned = dataclasses.replace(location, revision=commit)
    store = HubStore(pinned)
    sizes = store.listed(commit) or _sizes(snapshot / location.path)
    kind.check(sizes, location)

    def read(name: str) -> bytes:
        check_description(f"{location}/{name}", sizes[name])
        return store.content(commit, name)

    wanted = kind.select(ListedFiles(location, frozenset(sizes), read))
    named = [store.file(name) for name in wanted]  # from the top: the same files in two folders are two bases
    if location.path:
        # All folders of a commit share one directory, where one with a tokenizer and no weights would seem to be a
        # part of the model at the top: weights come first.
        store.snapshot([glob.escape(name) for name in filter(is_weights, named)], [])
    store.snapshot([glob.escape(name) for name in named], [])
    return snapshot / location.path, pinned, [location.repo_id, commit, *named]


def _states(kind: Kind, directory: Path) -> dict[Path, FileState]:
    with file_errors(f"reading {shown(directory)}", directory):
        return {path: FileState.of(path.stat()) for path in files_of(kind, directory)}


def _sizes(directory: Path) -> dict[str, int]:
    """Return names and sizes in bytes of all files below a directory, which need not exist."""
    paths = (Path(parent, name) for parent, _, names in os.walk(directory) for name in names)
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
