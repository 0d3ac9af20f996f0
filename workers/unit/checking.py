"""A checkpoint, wherever it is, held against the rules of the engines that are to load it."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import NotFoundError
from jobs.locations import Location
from workers.files.checkpoint import MAX_HEADER_BYTES
from workers.files.foreign import foreign_file, foreign_sha256
from workers.files.gguf_front import MAX_FRONT_BYTES, SUFFIX
from workers.files.layout import CheckpointLayout
from workers.files.local import FileState, file_errors
from workers.files.scratch import OwnedDirectory, sweep
from workers.releases.checks.checking import check_checkpoint
from workers.releases.checks.rules import Engine, Finding, Severity
from workers.releases.sinks.local_records import RECORDS_DIRECTORY
from workers.sources.belongings import CARD_NAME, is_template, is_tokenizer
from workers.sources.outlines import bring_outline
from workers.unit.forks import Bounds
from workers.unit.vetting import (
    CPU_SECONDS,
    MEMORY_BYTES,
    MEMORY_PER_TOKENIZER_BYTE,
    TOKENIZER_BYTES_PER_SECOND,
    key_of,
    try_out,
)

_HEADER_BYTES_PER_SECOND = 1 << 20
_MEMORY_PER_HEADER_BYTE = 128
"""The 90,000 tensors of DeepSeek-V3 with their scales, 11 MB of headers, take six seconds and 1.1 GB."""
_MAX_REMEMBERED = 64
"""Checks of merges: adapters of one recipe have the same names, shapes and files beside them."""
_TOLD_BEFORE = frozenset({"tokenizer.few-rows"})
"""What a plan tells in its notes already."""

_known: OrderedDict[str, tuple[Finding, ...]] = OrderedDict()


def check_release(location: Location, scratch: Path) -> tuple[Finding, ...]:
    """Check a checkpoint where it is: headers and small files are read, or brought by ranges. No GPU, no weights.

    Args:
        location: of a release, or of any checkpoint.
        scratch: directory for what is brought; made when missing.

    Returns:
        What was found, errors first.

    Raises:
        NotFoundError: there is no such place.
        BadInputError, UnsupportedError: what is there takes more than a check may, or the libraries stumble over it.
        AuthError, TransientIOError, NoCapacityError: by kind of fault.
    """
    with file_errors(f"making a directory in {scratch}", scratch):
        sweep(scratch, "check-")
        owned = OwnedDirectory.make(scratch, "check-")
    try:
        directory = bring_outline(location, owned.path)
        if not directory.is_dir():
            raise NotFoundError(f"{location} does not exist, or is no directory")
        vet_checkpoint(directory)
        return check_checkpoint(directory)
    finally:
        owned.leave()


def check_merged(directory: Path, layout: CheckpointLayout) -> tuple[list[str], list[str]]:
    """Check a merged checkpoint before it is published.

    Args:
        directory: holds its files; shards may be gone, where they were sent away.
        layout: of its shards.

    Returns:
        A sentence for each fault with which nothing loads it, and for each that some engine minds.
    """
    key = _key(directory, layout)
    if key not in _known:
        vet_checkpoint(directory)
        _known[key] = check_checkpoint(directory, layout)
        while len(_known) > _MAX_REMEMBERED:
            _known.popitem(last=False)
    found = [each for each in _known[key] if each.severity is not Severity.NOTE]
    fatal = [each for each in found if _is_fatal(each)]
    rest = [each for each in found if each not in fatal and each.rule.id not in _TOLD_BEFORE]
    return _sentences(fatal), _sentences(rest)


def vet_checkpoint(directory: Path) -> None:
    """Try out the check of a checkpoint, merged here or anywhere: its model is built, and its templates parsed.

    Raises:
        BadInputError: it takes more than that may; the message names what to look at.
        UnsupportedError: the libraries stumble over it.
        NotFoundError, AuthError, TransientIOError: it cannot be read.
    """
    sizes = {path: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
    shards = [path for path in sizes if path.suffix == ".safetensors"]
    header_bytes = sum(map(_header_bytes, shards))
    header_bytes += sum(min(size, MAX_FRONT_BYTES) for path, size in sizes.items() if path.suffix == SUFFIX)
    num_bytes = sum(size for path, size in sizes.items() if is_tokenizer(path.name) or is_template(path.name))
    of_headers, of_tokenizer = header_bytes // _HEADER_BYTES_PER_SECOND, num_bytes // TOKENIZER_BYTES_PER_SECOND
    memory_bytes = MEMORY_BYTES + max((sizes[path] for path in shards), default=0)
    memory_bytes += _MEMORY_PER_HEADER_BYTE * header_bytes + MEMORY_PER_TOKENIZER_BYTE * num_bytes
    try_out(
        directory,
        _check_checkpoint,
        directory,
        key=key_of("check", *(f"{path}:{FileState.of(path.stat())}" for path in sizes)),
        doing="checking it",
        suspects="the numbers in config.json, or its chat template",
        bounds=Bounds(cpu_seconds=2 * CPU_SECONDS + of_headers + of_tokenizer, memory_bytes=memory_bytes),
    )


def _header_bytes(path: Path) -> int:
    with foreign_file(path, any_size=True) as file:
        return min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES)


def _check_checkpoint(directory: Path) -> None:
    check_checkpoint(directory)


def _key(directory: Path, layout: CheckpointLayout) -> str:
    """Return a digest of what a check looks at: headers, and the files that are neither weights nor pages."""
    digest = hashlib.sha256()
    for shard in layout.shards:
        digest.update(shard.name.encode() + hashlib.sha256(shard.header).digest())
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        is_record = name.startswith(f"{RECORDS_DIRECTORY}/")
        if path.is_file() and not is_record and not name.endswith((".safetensors", SUFFIX, CARD_NAME)):
            digest.update(name.encode() + foreign_sha256(path, num_parts=name.count("/") + 1).encode())
    return digest.hexdigest()


def _is_fatal(each: Finding) -> bool:
    """Whether nothing loads the release: vLLM refuses it, and transformers does, or fills it with random values."""
    rule = each.rule
    by_transformers = Engine.TRANSFORMERS_5 in (*rule.refused_by, *rule.misread_by)
    return each.severity is Severity.ERROR and Engine.VLLM in rule.refused_by and by_transformers


def _sentences(findings: Sequence[Finding]) -> list[str]:
    return [each.sentence for each in findings]
