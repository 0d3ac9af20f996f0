"""The adapter of a request in a local directory: fetched, or made of several and kept in the cache."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file

from jobs.errors import UnsupportedError
from jobs.locations import LocalPath
from jobs.request import MergeRequest
from workers.adapters.adapter import ADAPTER_WEIGHTS, open_adapter
from workers.adapters.combination import Combined, combine
from workers.adapters.fitting import fit
from workers.adapters.trainers.conversion import convert_adapter
from workers.bases.model import skeleton
from workers.files.foreign import copy_foreign, foreign_sha256
from workers.files.layout import lay_out_shard
from workers.files.local import file_errors
from workers.files.scratch import keep_directory
from workers.merging.made_with import library_versions
from workers.releases.shipment import licences_of, shipped_files
from workers.sources.fetch import Source, fetch_adapter
from workers.unit.vetting import vet_adapter


def fetch_adapters(
    request: MergeRequest, base: Source, cache: Path, inert_fields: frozenset[str] = frozenset()
) -> Source:
    """Bring the adapter of a request to a local directory; several are combined into one, once, and kept in the cache.

    Args:
        request: says where the adapters are, and how they are combined.
        base: that they were made for.
        cache: where fetched and combined adapters are kept.
        inert_fields: of their configurations, as in `open_adapter`.

    Returns:
        One adapter. One that was combined knows what of, and its digest is made of the digests of those.

    Raises:
        NotFoundError, AuthError, TransientIOError, NoCapacityError: by kind of fault.
        UnsupportedError, BadInputError: an adapter cannot be used, or PEFT does not combine them without loss.
    """
    parts = _fetch_parts(request, base, cache, inert_fields)
    if request.combination is None:
        return parts[0]
    directory = cache / "combined" / _cache_key(request, base, parts)
    with file_errors(f"combining adapters in {directory}", directory):
        keep_directory(directory, lambda path: _make(request, base, parts, path, inert_fields))
    return _source(directory, parts)


def outline_adapters(
    request: MergeRequest, base: Source, cache: Path, directory: Path, inert_fields: frozenset[str] = frozenset()
) -> Source:
    """Do as `fetch_adapters`, but combine names and shapes alone: enough to plan with, and no weight is read.

    Args:
        request: says where the adapters are, and how they are combined.
        base: that they were made for.
        cache: where fetched adapters are kept.
        directory: an existing one, for the outline; its weights are a hole in a file.
        inert_fields: of their configurations, as in `open_adapter`.
    """
    parts = _fetch_parts(request, base, cache, inert_fields)
    if request.combination is None:
        return parts[0]
    combined = _combine(request, base, parts, inert_fields, values=False)
    shapes = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in combined.tensors.items()]
    layout = lay_out_shard(ADAPTER_WEIGHTS, shapes)
    with file_errors(f"outlining adapters in {directory}", directory):
        combined.config.save_pretrained(str(directory))
        with (directory / ADAPTER_WEIGHTS).open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.num_bytes)
        _copy(_common_files(parts) | _licences(parts), directory)
    return _source(directory, parts)


def _fetch_parts(request: MergeRequest, base: Source, cache: Path, inert_fields: frozenset[str]) -> tuple[Source, ...]:
    fetched = (fetch_adapter(each.adapter, cache) for each in request.weighted)
    parts = tuple(convert_adapter(adapter, base, cache, inert_fields) for adapter in fetched)
    for part in parts:
        vet_adapter(base, request, part)
    return parts


def _source(directory: Path, parts: tuple[Source, ...]) -> Source:
    digest = hashlib.sha256(json.dumps([part.digest for part in parts]).encode()).hexdigest()
    return Source(location=LocalPath(directory), directory=directory, digest=digest, parts=parts)


def _cache_key(request: MergeRequest, base: Source, parts: Sequence[Source]) -> str:
    key = request.merge_key(base.digest, _source(Path(), tuple(parts)).digest)
    versions = library_versions()
    return hashlib.sha256(json.dumps([key, versions["peft"], versions["torch"]]).encode()).hexdigest()


def _make(
    request: MergeRequest, base: Source, parts: Sequence[Source], directory: Path, inert_fields: frozenset[str]
) -> None:
    combined = _combine(request, base, parts, inert_fields, values=True)
    combined.config.save_pretrained(str(directory))
    save_file(dict(combined.tensors), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _copy(_common_files(parts) | _licences(parts), directory)


def _copy(files: Mapping[str, Path], directory: Path) -> None:
    for name, path in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        copy_foreign(path, directory / name, num_parts=name.count("/") + 1)


def _combine(
    request: MergeRequest, base: Source, parts: Sequence[Source], inert_fields: frozenset[str], *, values: bool
) -> Combined:
    assert request.combination is not None
    _common_files(parts)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(base.directory).state_dict().items()}
    opened = [open_adapter(part.directory, inert_fields, part.beside) for part in parts]
    adapters = [fit(adapter, shapes, lambda: skeleton(base.directory)) for adapter in opened]
    weights = [each.weight for each in request.weighted]
    return combine(adapters, weights, request.combination, base.directory, values=values)


def _common_files(parts: Sequence[Source]) -> dict[str, Path]:
    """Return the tokenizer, processor and template files that the adapters ship.

    Raises:
        UnsupportedError: two of them ship different ones.
    """
    files: dict[str, Path] = {}
    for part in parts:
        for name, path in shipped_files(part.directory).items():
            other = files.setdefault(name, path)
            with file_errors(f"reading {path}", path):
                num_parts = name.count("/") + 1
                is_same = foreign_sha256(other, num_parts=num_parts) == foreign_sha256(path, num_parts=num_parts)
            if not is_same:
                raise UnsupportedError(
                    f"{path} and {other} differ, and the merged model has one {name}; remove it from the adapters "
                    "that the merged model should not take it from"
                )
    return files


def _licences(parts: Sequence[Source]) -> dict[str, Path]:
    """Return the licences of all adapters, under names that tell them apart."""
    return {
        f"{name}.{number}": path
        for number, part in enumerate(parts, 1)
        for name, path in licences_of(part.directory).items()
    }
