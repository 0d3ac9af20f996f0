"""Bases whose weights are pickled: written once as safetensors, by a closed process, and kept in the cache.

What is read is a state dict as `save_pretrained` of transformers 4 wrote it, in one file or in parts.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jobs.errors import BadInputError, NotFoundError, TransientIOError
from workers.files.checkpoint import read_shard
from workers.files.foreign import copy_foreign, foreign_sha256
from workers.files.layout import INDEX_FILE, SINGLE_FILE
from workers.files.local import FileState, sha256_of
from workers.sources.pickled import convert

_SINGLE = "pytorch_model.bin"
_PART = re.compile(r"pytorch_model-(\d{5})-of-(\d{5})\.bin")
_CONTENTS = ".unpickled.json"
"""Name and SHA-256 of each file, as they were written. No file of a base is copied under such a name."""
_ADVICE = "if you trust its source, load the base with transformers and save it again, which writes safetensors"


def pickled_weights(names: Iterable[str]) -> tuple[str, ...]:
    """Return the files that hold a base's weights as a pickled state dict, in order; none where there are none.

    Args:
        names: of the files of its directory.

    Raises:
        NotFoundError: a part is missing.
    """
    there = frozenset(names)
    parts = sorted(name for name in there if _PART.fullmatch(name))
    if not parts:
        return (_SINGLE,) if _SINGLE in there else ()
    totals = {match[2] for name in parts if (match := _PART.fullmatch(name))}
    expected = [f"pytorch_model-{number:05d}-of-{max(totals)}.bin" for number in range(1, int(max(totals)) + 1)]
    if missing := next((name for name in expected if name not in there), None):
        raise NotFoundError(f"the base has no {missing}, a part of its weights; fetch all {len(expected)} of them")
    return tuple(expected)


def unpickle(directory: Path, pickled: Sequence[str], others: Sequence[str], target: Path) -> None:
    """Write a base with its weights in safetensors.

    Args:
        directory: of the base.
        pickled: its weights, as `pickled_weights` found them.
        others: its other files.
        target: an empty directory.

    Raises:
        BadInputError: two parts hold a tensor of one name.
        TransientIOError: the base was changed meanwhile.
        As `workers.sources.pickled.convert`.
    """
    states = [FileState.of((directory / name).stat()) for name in pickled]
    where: dict[str, str] = {}
    for number, name in enumerate(pickled, start=1):
        shard = SINGLE_FILE if len(pickled) == 1 else f"model-{number:05d}-of-{len(pickled):05d}.safetensors"
        convert(directory / name, target / shard, advice=_ADVICE)
        for spec in read_shard(target / shard).tensors:
            if spec.name in where:
                raise BadInputError(f"{directory / name}: tensor {spec.name} is in another part, too; fetch them again")
            where[spec.name] = shard
    if len(pickled) > 1:
        (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=2) + "\n")
    for name in others:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_foreign(directory / name, target / name, num_parts=name.count("/") + 1)
    if [FileState.of((directory / name).stat()) for name in pickled] != states:
        raise TransientIOError(f"base {directory} was changed while it was read; it is read anew")
    contents = [(shard, sha256_of(target / shard)) for shard in sorted(set(where.values()))]
    contents += [(name, foreign_sha256(target / name, num_parts=name.count("/") + 1)) for name in others]
    (target / _CONTENTS).write_text(json.dumps(contents))


def contents_of(unpickled: Path) -> list[list[str]]:
    """Return what identifies a base that `unpickle` has written: name and SHA-256 of each file."""
    contents: list[list[str]] = json.loads((unpickled / _CONTENTS).read_bytes())
    return contents
