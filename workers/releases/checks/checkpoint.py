"""A checkpoint as it is looked at: its small files and the headers of its shards, whatever is wrong with them.

`workers/files/checkpoint.py` reads those that are merged, and refuses the first fault; here each fault is kept, so that
all of them can be told.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError, NotFoundError
from workers.bases.tokenizers import TokenizerData, read_tokenizer
from workers.files.checkpoint import MAX_SHARDS, read_json, read_shard
from workers.files.gguf_front import SUFFIX, GgufFront, front_of, read_front
from workers.files.layout import INDEX_FILE, SINGLE_FILE, CheckpointLayout, ShardLayout, TensorSpec
from workers.sources.belongings import TEMPLATE_FOLDER, TOKENIZER_CONFIG, TOKENIZER_FILE, is_pickled, is_template
from workers.sources.listing import LocalFiles

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
_MAX_GGUF_FILES = 100
"""Of one directory: a model in every type there is has thirty."""
_DOCUMENTS = (
    CONFIG,
    INDEX_FILE,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    ADAPTER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What of a checkpoint is known without its weights."""

    directory: Path
    files: Mapping[str, Path]
    """At the top, and chat templates in their folder, by name."""
    documents: Mapping[str, Mapping[str, Any]]
    """The small JSON files that are objects, by name."""
    unreadable: Mapping[str, str]
    """Why a file cannot be read, by name."""
    shards: Mapping[str, ShardLayout]
    """All safetensors files at the top whose headers can be read, by name."""
    gguf: Mapping[str, GgufFront]
    """Where there are no other weights: all GGUF files at the top whose metadata can be read, by name."""
    tokenizer: TokenizerData | None
    """Its tokenizer as data; None where there is none, or none that can be read."""

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json`; empty where there is none."""
        return self.documents.get(CONFIG, {})

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of `config.json` that describes the language model."""
        text = self.config.get("text_config")
        return text if isinstance(text, dict) else self.config

    @functools.cached_property
    def weight_map(self) -> Mapping[str, str] | None:
        """Which file holds each tensor, as the index says; None where there is none that can be read."""
        found = self.documents.get(INDEX_FILE, {}).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            return None
        return found or None

    @functools.cached_property
    def loaded(self) -> Mapping[str, ShardLayout]:
        """The shards that transformers loads: the single file, else those that the index names."""
        if SINGLE_FILE in self.files:
            names = [SINGLE_FILE]
        elif self.weight_map is not None:
            names = sorted(set(self.weight_map.values()))
        else:
            names = sorted(name for name in self.shards if name.startswith("model"))
        return {name: self.shards[name] for name in names if name in self.shards}

    @functools.cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors of those shards, by name."""
        return {spec.name: spec for shard in self.loaded.values() for spec in shard.tensors}

    @functools.cached_property
    def file_of(self) -> Mapping[str, str]:
        """The shard of each tensor."""
        return {spec.name: shard.name for shard in self.loaded.values() for spec in shard.tensors}


def read_leniently(directory: Path, layout: CheckpointLayout | None = None) -> Checkpoint:
    """Read what there is of a checkpoint.

    Args:
        directory: of it.
        layout: its shards, where they are known and need not lie there (any more).

    Raises:
        NotFoundError: there is no such directory.
        AuthError, TransientIOError: it cannot be read, by kind of fault.
    """
    if not directory.is_dir():
        raise NotFoundError(f"{directory} does not exist, or is no directory")
    place = LocalFiles(directory)
    names = set(place.top())
    if TEMPLATE_FOLDER in place.folders():
        names |= {name for name in place.below(TEMPLATE_FOLDER) if is_template(name)}
    documents: dict[str, Mapping[str, Any]] = {}
    unreadable: dict[str, str] = {}
    for name in _DOCUMENTS:
        if name in names:
            try:
                found = read_json(directory / name)
            except BadInputError as error:
                unreadable[name] = str(error).removeprefix(f"{directory / name}: ")
                continue
            if isinstance(found, dict):
                documents[name] = found
            else:
                unreadable[name] = f"expected a JSON object, found {type(found).__name__}"
    shards = {} if layout is None else {shard.name: shard for shard in layout.shards}
    if layout is not None:
        names |= shards.keys()
        in_gguf = {name: shards.pop(name) for name in list(shards) if name.endswith(SUFFIX)}
        gguf = {name: front_of(shard.header, directory / name, shard.num_bytes) for name, shard in in_gguf.items()}
    else:
        gguf = _gguf(directory, names, unreadable)
        for name in sorted(name for name in names if name.endswith(".safetensors"))[:MAX_SHARDS]:
            try:
                shards[name] = read_shard(directory / name)
            except BadInputError as error:
                unreadable[name] = str(error).removeprefix(f"{directory / name}: ")
    files = {name: directory / name for name in sorted(names)}
    tokenizer = _tokenizer(directory, files, unreadable)
    return Checkpoint(
        directory=directory,
        files=files,
        documents=documents,
        unreadable=unreadable,
        shards=shards,
        gguf=gguf,
        tokenizer=tokenizer,
    )


def _gguf(directory: Path, names: Collection[str], unreadable: dict[str, str]) -> dict[str, GgufFront]:
    """Read the GGUF files of a directory that has its weights in nothing else."""
    if INDEX_FILE in names or any(name.endswith(".safetensors") or is_pickled(name) for name in names):
        return {}
    found = dict[str, GgufFront]()
    for name in sorted(name for name in names if name.endswith(SUFFIX))[:_MAX_GGUF_FILES]:
        try:
            found[name] = read_front(directory / name)
        except BadInputError as error:
            unreadable[name] = str(error).removeprefix(f"{directory / name}: ")
    return found


def _tokenizer(directory: Path, files: Mapping[str, Path], unreadable: dict[str, str]) -> TokenizerData | None:
    try:
        return read_tokenizer(files)
    except BadInputError as error:
        place = next((name for name in files if f"/{name}: " in str(error)), TOKENIZER_FILE)
        unreadable.setdefault(place, str(error).removeprefix(f"{directory / place}: "))
        return None
