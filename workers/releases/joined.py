"""Files of a release that are copies of none: what base and adapter hold of one thing in files of different kinds.

A chat template stands in a file of its own, or in `tokenizer_config.json`. Processors stand in files of their own, or
in `processor_config.json`, where transformers 5 saves them, and where they win over such files. Sources:
transformers/tokenization_utils_base.py and image_processing_base.py of transformers 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError
from jobs.release import is_plain_path
from jobs.request_files.problems import show
from workers.files.checkpoint import read_json
from workers.sources.belongings import TEMPLATE_FOLDER, is_processor

_PROCESSOR = "processor_config.json"
_NESTED = {
    "image_processor": "preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
    "audio_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
"""Parts that `processor_config.json` may hold, and the files that hold them otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The processor files of a release."""

    files: dict[str, Path]
    """Copied as they are, by name."""
    made: dict[str, Any] = field(default_factory=dict)
    """Documents that are written anew, by name."""


def templates_within(tokenizer_config: Path) -> dict[str, str]:
    """Return the chat templates that a `tokenizer_config.json` holds, by the names of the files they may stand in.

    Raises:
        BadInputError: it is no JSON, or a template has a name that no file has.
    """
    document = read_json(tokenizer_config)
    held = document.get("chat_template") if isinstance(document, dict) else None
    if isinstance(held, str):
        held = {"default": held}
    elif isinstance(held, list):
        held = {each.get("name"): each.get("template") for each in held if isinstance(each, dict)}
    templates = dict[str, str]()
    for name, template in held.items() if isinstance(held, dict) else ():
        if not isinstance(template, str):
            continue
        if not (isinstance(name, str) and "/" not in name and is_plain_path(f"{name}.jinja")):
            raise BadInputError(f"{tokenizer_config}: chat_template: expected names of files, found {show(name)}")
        templates["chat_template.jinja" if name == "default" else f"{TEMPLATE_FOLDER}/{name}.jinja"] = template
    return templates


def join_processors(base: Mapping[str, Path], adapter: Mapping[str, Path]) -> Joined:
    """Lay the processors of an adapter over those of its base: part by part, the adapter's where it has one.

    Args:
        base: its files, by name.
        adapter: the same.

    Raises:
        BadInputError: one of them is no JSON.
    """
    ours = {name: path for name, path in base.items() if is_processor(name)}
    theirs = {name: path for name, path in adapter.items() if is_processor(name)}
    if not theirs:
        return Joined(files=ours)
    documents = {name: _object(path) for name, path in theirs.items()}
    nested = _parts(documents.get(_PROCESSOR, {}))
    beside = documents.keys() & set(_NESTED.values())
    brought = nested | {part for name in beside for part in _held(documents[name], name)}
    stay = {
        name: path
        for name, path in ours.items()
        if name not in _NESTED.values() or not nested.intersection(_held(_object(path), name))
    }
    files = stay | theirs
    if _PROCESSOR not in ours:
        return Joined(files=files)
    own = _object(ours[_PROCESSOR])
    kept = {part: own[part] for part in _parts(own) - brought}
    first = documents.get(_PROCESSOR, {name: value for name, value in own.items() if name not in _NESTED})
    document = first | kept
    if document == _object(files[_PROCESSOR]):
        return Joined(files=files)
    del files[_PROCESSOR]
    return Joined(files=files, made={_PROCESSOR: document})


def _parts(document: Mapping[str, Any]) -> frozenset[str]:
    """Return the parts that a `processor_config.json` holds."""
    return frozenset(part for part in _NESTED if document.get(part))


def _held(document: Mapping[str, Any], name: str) -> list[str]:
    """Return the parts that a file of their own holds: those whose type it tells, or all that it may."""
    parts = [part for part, file in _NESTED.items() if file == name]
    return [part for part in parts if f"{part}_type" in document] or parts


def _object(path: Path) -> dict[str, Any]:
    document = read_json(path)
    return document if isinstance(document, dict) else {}
