"""Which files of an adapter hold trained weights, and the tensors of all of them in one safetensors file.

PEFT reads `adapter_model.safetensors` alone. Large adapters are saved in several files, and trainers put what they
trained beside the adapter's layers into files of their own. None of them may be left out in silence.
"""

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import BadInputError, NotFoundError, UnsupportedError
from workers.files.checkpoint import read_json, read_shard
from workers.files.layout import ShardLayout, TensorSpec, lay_out_shard
from workers.files.tensor_io import opened, read_into_bytes, write_all
from workers.sources.foreign_adapters import files_of_trainers
from workers.sources.pickled import CONVERTED_WEIGHTS, MOVE_AWAY, PICKLED_WEIGHTS, SAVE_AGAIN, convert
from workers.sources.torchtune_copies import leave_out_copies

ADAPTER_WEIGHTS = CONVERTED_WEIGHTS
ORIGINS_FILE = ".trained_beside.json"
"""Of a gathered directory: for each tensor that is not the adapter's own, the file it came from. No file of an adapter
is copied under such a name, and no other directory is asked for it."""
GATHERED_VERSION = 2
"""Of what `gather` writes: those of other versions are made anew."""
REORDERED_FILE = ".reordered_beside.json"
"""Of a gathered directory: tensors of torchtune's own copy whose rows are in another order in the adapter's files."""
_VALUE_HEAD = "v_head."
"""What TRL puts before the names of a value head."""
_SHARDS = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_INDEXES = ("adapter_model.safetensors.index.json", "adapter_model.bin.index.json", "model.safetensors.index.json")
"""The last one is the name that transformers gives it."""
_READ = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NOT_READ = (".h5", ".msgpack", ".npy", ".npz", ".params", ".pickle", ".pkl", ".pth.tar", ".th", ".torch")
"""Formats of weights that are never opened."""
_BYSTANDERS = (
    "optimizer*",
    "*_optim_states.pt",  # of DeepSpeed
    "recipe_state*",  # of torchtune
    "scheduler*",
    "lr_scheduler*",
    "rng_state*",
    "random_states_*",
    "training_args*",
    "trainer_state*",
    "scaler*",
    "sampler*",
    "dataloader*",
    "[0-9][0-9][0-9][0-9][0-9][0-9][0-9]_adapters.safetensors",  # of MLX, from the middle of a training
)
"""What trainers keep to go on with; nothing that a model computes with."""
_WHOLE_MODELS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin", "consolidated*")
_COPIED_BYTES = 16 << 20


_Found = tuple[str, Path, TensorSpec]
"""A tensor: the file of the adapter that it came from, the safetensors file that holds it, and where in that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files of a directory that hold weights of one adapter."""

    own: tuple[str, ...]
    """The adapter itself: one file, or all parts of it in order."""
    beside: tuple[str, ...]
    """Trained together with it."""

    @property
    def plain(self) -> bool:
        """Whether the adapter is what PEFT reads, and all of it."""
        return self.own == (ADAPTER_WEIGHTS,) and not self.beside


def weight_files(names: Iterable[str], place: str) -> WeightFiles:
    """Find the files that hold weights of an adapter.

    Args:
        names: of all files of its directory, folders not included.
        place: the directory, for messages.

    Raises:
        NotFoundError: there are none, or a part is missing.
        UnsupportedError: they are of another kind than PEFT's, or two sets of them are there.
    """
    there = sorted(name for name in names if "/" not in name)
    own = _own(there, place)
    beside = []
    for name in there:
        if name in own or name in (ADAPTER_WEIGHTS, PICKLED_WEIGHTS) or _SHARDS.fullmatch(name):
            continue
        ending = name.lower()
        if not ending.endswith(_READ + _NOT_READ) or _matches(name, _BYSTANDERS):
            continue
        if ending.endswith(_NOT_READ) or _matches(name, _WHOLE_MODELS):
            raise UnsupportedError(
                f"{place}: {name} beside the adapter may hold weights that were trained with it, and is not read; move "
                "it elsewhere if the adapter does not need it, or merge it into the base first"
            )
        beside.append(name)
    return WeightFiles(own=own, beside=tuple(beside))


def gather(directory: Path, files: WeightFiles, target: Path) -> None:
    """Write all tensors of an adapter to `adapter_model.safetensors` of another directory.

    Pickled files are converted in a closed process first. Tensors keep their bytes and their names, which in files
    called `value_head.*` begin with `v_head.` in any case. `ORIGINS_FILE` says where those came from that were not in
    the adapter's own files.

    Args:
        directory: of the adapter.
        files: of it.
        target: an existing directory.

    Raises:
        NotFoundError: a file is missing.
        BadInputError: a file is malformed, or two hold different tensors of one name.
        As `workers.sources.pickled.convert` for a pickled one.
    """
    if files.own == (PICKLED_WEIGHTS,) and not files.beside:
        convert(directory / PICKLED_WEIGHTS, target / ADAPTER_WEIGHTS)
        _write(target / ORIGINS_FILE, {})
        _write(target / REORDERED_FILE, [])
        return
    read: list[tuple[str, Path, ShardLayout]] = []
    converted = []
    for name in (*files.own, *files.beside):
        path = directory / name
        if path.suffix.lower() != ".safetensors":
            path = target / f"{name}.part"
            convert(directory / name, path, advice=MOVE_AWAY if name in files.beside else SAVE_AGAIN)
            converted.append(path)
        read.append((name, path, read_shard(path)))
    kept, reordered = leave_out_copies(directory, read, beside=files.beside)
    found = _by_name(directory, files, kept)
    _check_index(directory, files, found)
    _write(target / ORIGINS_FILE, {tensor: name for tensor, (name, _, _) in found.items() if name in files.beside})
    _write(target / REORDERED_FILE, reordered)
    layout = lay_out_shard(ADAPTER_WEIGHTS, [(name, spec.dtype, spec.shape) for name, (_, _, spec) in found.items()])
    with (target / ADAPTER_WEIGHTS).open("xb") as file:
        write_all(file.fileno(), target / ADAPTER_WEIGHTS, layout.header, 0)
        for spec in layout.tensors:
            _, path, source = found[spec.name]
            _copy(path, source, file.fileno(), target / ADAPTER_WEIGHTS, spec.begin)
    for path in converted:
        path.unlink()


def read_origins(gathered: Path) -> dict[str, str]:
    """Return the files that tensors of a gathered adapter came from, where it is not the adapter's own, by tensor.

    Args:
        gathered: a directory that `gather` has filled, and nothing else.
    """
    origins: dict[str, str] = json.loads((gathered / ORIGINS_FILE).read_bytes())
    return origins


def read_reordered(gathered: Path) -> tuple[str, ...]:
    """Return the tensors of torchtune's own copy of an adapter that `gather` has found in another order of rows.

    Args:
        gathered: as in `read_origins`.
    """
    return tuple(json.loads((gathered / REORDERED_FILE).read_bytes()))


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _own(there: list[str], place: str) -> tuple[str, ...]:
    parts = {kind: [name for name in there if _SHARDS.fullmatch(name) and name.endswith(kind)] for kind in _READ[:2]}
    if ADAPTER_WEIGHTS in there:
        if parts[".safetensors"]:
            raise UnsupportedError(
                f"{place}: {ADAPTER_WEIGHTS} and {parts['.safetensors'][0]} are both there, and nothing says which is "
                "the adapter; remove the one that is not"
            )
        return (ADAPTER_WEIGHTS,)
    for name, shards in ((None, parts[".safetensors"]), (PICKLED_WEIGHTS, parts[".bin"])):
        if name in there:
            return (PICKLED_WEIGHTS,)
        if shards:
            return _all_of(shards, place)
    return files_of_trainers(there, place)


def _all_of(shards: list[str], place: str) -> tuple[str, ...]:
    totals = {match[2] for name in shards if (match := _SHARDS.fullmatch(name))}
    total, kind = max(totals), shards[0].rpartition(".")[2]
    expected = [f"adapter_model-{number:05d}-of-{total}.{kind}" for number in range(1, int(total) + 1)]
    if len(totals) > 1:
        raise UnsupportedError(
            f"{place}: parts of two adapters, of {' and of '.join(sorted(totals))}, are there; remove the ones that "
            "are not the adapter's"
        )
    if missing := [name for name in expected if name not in shards]:
        raise NotFoundError(f"{place} has no {missing[0]}, a part of the adapter; fetch all {int(total)} of them")
    return tuple(expected)


def _by_name(directory: Path, files: WeightFiles, read: Iterable[tuple[str, Path, ShardLayout]]) -> dict[str, _Found]:
    """Return the tensors of an adapter's files by their names, those of its own files first."""
    found: dict[str, _Found] = {}
    for name, path, shard in read:
        for spec in shard.tensors:
            tensor = spec.name
            if name.startswith("value_head.") and _VALUE_HEAD not in tensor:
                tensor = f"{_VALUE_HEAD}{tensor}"
            if tensor not in found:
                found[tensor] = (name, path, spec)
            # accelerate saves the adapter once more under FSDP (pytorch_model_fsdp.bin).
            elif name not in files.beside or not _same(found[tensor], (name, path, spec)):
                raise BadInputError(
                    f"{directory}: {found[tensor][0]} and {name} both hold tensor {tensor}, and nothing says "
                    "which counts; remove the file that is not the adapter's"
                )
    return found


def _check_index(directory: Path, files: WeightFiles, found: Mapping[str, _Found]) -> None:
    """Check that all tensors that an index names are there, each in its file."""
    if len(files.own) == 1:
        return
    for path in (directory / name for name in _INDEXES):
        index = read_json(path) if path.is_file() else {}
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not set(files.own) & {str(place) for place in places.values()}:
            continue
        for name, place in sorted(places.items()):
            where = found[name][0] if name in found else "nowhere"
            if where != place:
                raise BadInputError(
                    f"{path}: tensor {name}: expected in {place}, found {where}; "
                    "files of two adapters are mixed, or one is incomplete: fetch them again"
                )


def _same(one: _Found, other: _Found) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    (_, path, spec), (_, other_path, other_spec) = one, other
    if (spec.code, spec.shape) != (other_spec.code, other_spec.shape):
        return False
    with opened(path) as reading, opened(other_path) as other_reading:
        both = zip(_chunks(reading, path, spec), _chunks(other_reading, other_path, other_spec), strict=True)
        return all(chunk == other_chunk for chunk, other_chunk in both)


def _copy(path: Path, source: TensorSpec, descriptor: int, target: Path, begin: int) -> None:
    with opened(path) as reading:
        for offset, data in _chunks(reading, path, source):
            write_all(descriptor, target, data, begin + offset)


def _chunks(descriptor: int, path: Path, source: TensorSpec) -> Iterator[tuple[int, bytes]]:
    for offset in range(0, source.num_bytes, _COPIED_BYTES):
        size = min(_COPIED_BYTES, source.num_bytes - offset)
        yield offset, read_into_bytes(descriptor, path, size, source.begin + offset)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
