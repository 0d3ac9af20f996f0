"""An adapter that another trainer wrote, converted once into PEFT's layout, for one base, and kept in the cache.

All that follows sees an adapter of PEFT. No value is computed with: elements are moved, and what deltas are multiplied
by is written into the configuration. Every stored tensor becomes one of PEFT's, or the adapter is refused by its name.
"""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

from jobs.errors import BadInputError, UnsupportedError
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.adapters.config import ADAPTER_CONFIG, read_config
from workers.adapters.trainers import mlx, tinker, torchtune
from workers.adapters.trainers.layout import Converted, Foreign, KnownBase
from workers.files.checkpoint import read_checkpoint, read_json, read_shard
from workers.files.foreign import copy_foreign
from workers.files.layout import lay_out_shard
from workers.files.local import FileState, file_errors
from workers.files.scratch import keep_directory
from workers.files.tensor_io import opened, read_rows, tensor_bytes, write_all
from workers.sources.fetch import Source
from workers.sources.kinds import ADAPTER, files_of

TRAINERS: tuple[ModuleType, ...] = (mlx, torchtune, tinker)
"""Asked in this order. Each has `recognizes`, which looks at configuration and names, and `convert`."""
_VERSION = 1
"""Of what conversions write: a change of it makes them anew."""
_MAX_GROWTH = 4
"""Of a converted adapter against its base: what experts share is written once for each of them."""


def convert_adapter(adapter: Source, base: Source, cache: Path, inert_fields: frozenset[str] = frozenset()) -> Source:
    """Return an adapter in PEFT's layout: itself, or what is made of it.

    Args:
        adapter: in a local directory, its weights in one file.
        base: that it is merged into; some layouts depend on it.
        cache: where converted adapters are kept.
        inert_fields: of its configuration, as in `open_adapter`.

    Returns:
        The adapter. One that was converted has the digest of the files as they were, and notes that tell of it.

    Raises:
        NotFoundError: a file is missing.
        BadInputError: a file is malformed, or does not go with the others.
        UnsupportedError: a tensor or a field is none that the trainer is known to write, or has no place in the base.
        TransientIOError, NoCapacityError: files cannot be read or written, or were changed meanwhile.
    """
    config = read_config(adapter.directory)
    tensors = {spec.name: spec for spec in read_shard(adapter.directory / ADAPTER_WEIGHTS).tensors}
    trainer = next((each for each in TRAINERS if each.recognizes(config, frozenset(tensors))), None)
    if trainer is None:
        torchtune.check_export(adapter, lambda: _known(base))
        return adapter
    foreign = Foreign(
        place=str(adapter.location),
        file=f"{adapter.location}: {ADAPTER_CONFIG}",
        config=config,
        tensors=tensors,
        inert_fields=inert_fields,
    )
    known = _known(base)
    converted: Converted = trainer.convert(foreign, known)
    _check(foreign, known, converted)
    identity = [_VERSION, adapter.digest, base.digest, sorted(inert_fields)]
    directory = cache / "converted" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    with file_errors(f"converting adapter {adapter.location} in {directory}", directory):
        keep_directory(directory, lambda path: _write(adapter, converted, path))
        states = {path: FileState.of(path.stat()) for path in files_of(ADAPTER, directory)}
    told = f"{converted.words}, converted: its {len(tensors)} tensors are {len(converted.pieces)} of PEFT"
    return dataclasses.replace(adapter, directory=directory, beside={}, notes=(*adapter.notes, told), states=states)


def _known(base: Source) -> KnownBase:
    config = read_json(base.directory / "config.json")
    if not isinstance(config, dict):
        raise BadInputError(f"{base.directory}/config.json: expected a JSON object, found {type(config).__name__}")
    text = config.get("text_config")
    layout = read_checkpoint(base.directory)
    return KnownBase(
        directory=base.directory,
        config=text if isinstance(text, dict) else config,
        names=frozenset(layout.tensors),
        num_bytes=layout.total_size,
    )


def _check(foreign: Foreign, base: KnownBase, converted: Converted) -> None:
    """Check that every tensor becomes one, no two become one, and all of them together do not fill a disk."""
    name, count = Counter(piece.name for piece in converted.pieces).most_common(1)[0]
    if count > 1:
        raise BadInputError(f"{foreign.place}: two tensors are {name} of PEFT, and nothing says which counts")
    if (
        left := foreign.tensors.keys()
        - {each.name for piece in converted.pieces for each in (piece.source, *piece.others)}
        - converted.empty
    ):
        raise UnsupportedError(
            f"{foreign.place}: tensor {min(left)} has no place in an adapter of PEFT; leaving it out would change "
            "the model, so the merge is refused"
        )
    num_bytes = sum(piece.source.dtype.itemsize * math.prod(piece.shape) for piece in converted.pieces)
    if num_bytes > max(_MAX_GROWTH * base.num_bytes, sum(spec.num_bytes for spec in foreign.tensors.values())):
        raise BadInputError(
            f"{foreign.place}: expected an adapter of at most {_MAX_GROWTH} times the {base.num_bytes} bytes of its "
            f"base, found one that is {num_bytes} bytes as PEFT has it"
        )


def _write(adapter: Source, converted: Converted, target: Path) -> None:
    """Fill a directory with the converted adapter and the files beside it."""
    (target / ADAPTER_CONFIG).write_text(json.dumps(dict(converted.config), indent=2) + "\n")
    pieces = {piece.name: piece for piece in converted.pieces}
    layout = lay_out_shard(ADAPTER_WEIGHTS, [(name, p.source.dtype, p.shape) for name, p in pieces.items()])
    path = target / ADAPTER_WEIGHTS
    weights = adapter.directory / ADAPTER_WEIGHTS
    with opened(weights) as reading, path.open("xb") as file:
        write_all(file.fileno(), path, layout.header, 0)
        for spec in layout.tensors:
            piece = pieces[spec.name]
            begin, end = (0, piece.source.shape[0] if piece.source.shape else 1)
            if piece.row is not None:
                begin, end = piece.row, piece.row + 1
            stored = read_rows(weights, piece.source, begin, end, reading)
            others = [read_rows(weights, each, 0, each.shape[0], reading) for each in piece.others]
            made = piece.make(stored if piece.row is None else stored[0], *others)
            assert tuple(made.shape) == piece.shape
            write_all(file.fileno(), path, tensor_bytes(made.contiguous()), spec.begin)
    for each in files_of(ADAPTER, adapter.directory):
        name = each.relative_to(adapter.directory).as_posix()
        if name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy_foreign(each, target / name, num_parts=name.count("/") + 1)
    adapter.check_unchanged()
