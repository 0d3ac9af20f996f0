"""The code that comes with a model: which files its configurations name. It is found, copied and never run.

Where transformers looks: `auto_map` in any configuration, and `custom_pipelines`, hold `module.Class` for a file beside
the configuration, or `owner/name--module.Class` for one in a repository of the Hub; a module brings those that it
imports relatively. Source: transformers/dynamic_module_utils.py of transformers 5.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.errors import BadInputError
from jobs.release import is_plain_path

_ELSEWHERE = "--"
"""Stands between a repository of the Hub and what is named in it."""
_FROM = re.compile(r"[ \t]*from[ \t]+\.([\w.]*)[ \t]+import[ \t]+(.*)")
_IMPORT = re.compile(r"[ \t]*import[ \t]+\.([\w.]+)[ \t]*")
_MAX_FILES = 256
"""Of one model's code; none has as many."""
_MAX_REFERENCES = 1000
_MAX_SOURCE_BYTES = 1 << 20
_MAX_LINE = 1000
"""Characters of a line that imports."""


class CodePlace(Protocol):
    """Where code is looked for."""

    def has(self, name: str) -> bool:
        """Whether there is a file, named from the top."""
        ...

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one reference."""

    files: frozenset[str]
    """Its file, and all those that it imports."""
    missing: str | None
    """A file that is not there, and without which the others are of no use."""


def references(document: Any) -> Iterator[str]:
    """Yield what a configuration names of code beside it, as `module.Class`, wherever in it that stands."""
    for holder, key in _holders(document):
        value = holder[key]
        yield from (each for each in (value if isinstance(value, list) else [value]) if _is_here(each))


def code_of(documents: Mapping[str, Any], place: CodePlace) -> dict[str, Found]:
    """Find the code that some configurations name.

    Args:
        documents: the configurations.
        place: where they are.

    Returns:
        What was found, by reference.

    Raises:
        BadInputError: they name far more than any model has, or as `find`.
    """
    named = set[str]()
    for name, document in documents.items():
        named |= set(references(document))
        if len(named) > _MAX_REFERENCES:
            raise BadInputError(
                f"{name}: auto_map: expected at most {_MAX_REFERENCES} references to code, found {len(named)}"
            )
    return {reference: find(reference, place) for reference in sorted(named)}


def find(reference: str, place: CodePlace) -> Found:
    """Find the file of one reference, and what it imports.

    Raises:
        BadInputError: a file is far larger than code is.
    """
    first = f"{reference.rpartition('.')[0].replace('.', '/')}.py"
    waiting, found = [first], set[str]()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if not is_plain_path(name) or not place.has(name) or len(found) == _MAX_FILES:
            return Found(frozenset(found), name)
        found.add(name)
        folder = name.rpartition("/")[0]
        source = place.read(name)
        if len(source) > _MAX_SOURCE_BYTES:
            raise BadInputError(
                f"{name}, which auto_map names or its code imports: expected at most {_MAX_SOURCE_BYTES} bytes, found "
                f"{len(source)}"
            )
        for module, is_needed in _imports(source.decode(errors="replace")):
            files = _module_files(folder, module)
            there = [file for file in files if is_plain_path(file) and place.has(file)]
            if there or is_needed:
                waiting += there or files[:1]
    return Found(frozenset(found), None)


def custom_modules(types: Iterable[str], place: CodePlace) -> frozenset[str]:
    """Return the code of those classes of a sentence-transformers model that come with it; others are of packages."""
    found = [find(name, place) for name in types if not name.startswith("sentence_transformers.")]
    return frozenset(name for each in found for name in each.files)


def leave_out(document: Any, broken: Collection[str]) -> None:
    """Take references out of a configuration, in place: classes of transformers are loaded instead."""
    for holder, key in list(_holders(document)):
        value = holder[key]
        if isinstance(value, list):  # the slow and the fast class of a tokenizer
            holder[key] = [None if isinstance(each, str) and each in broken else each for each in value]
            is_gone = not any(holder[key])
        else:
            is_gone = isinstance(value, str) and value in broken
        if is_gone:
            del holder[key]
    for part in _objects(document):
        for field in ("auto_map", "custom_pipelines"):
            if isinstance(part.get(field), dict):
                part[field] = {key: value for key, value in part[field].items() if value != {}}
                if not part[field]:
                    del part[field]


def _holders(document: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each place of a reference: the object that holds it, and its key there."""
    for part in _objects(document):
        auto_map, pipelines = part.get("auto_map"), part.get("custom_pipelines")
        if isinstance(auto_map, dict):
            yield from ((auto_map, key) for key in auto_map)
        if isinstance(pipelines, dict):
            yield from ((each, "impl") for each in pipelines.values() if isinstance(each, dict) and "impl" in each)


def _objects(document: Any) -> Iterator[dict[str, Any]]:
    waiting = [document]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            yield part


def _is_here(value: Any) -> bool:
    return isinstance(value, str) and "." in value and _ELSEWHERE not in value


def _imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield the modules that a file imports relatively, and whether it cannot do without.

    Line by line, which is how transformers looks for them: Python's parser can be made to crash by what it parses.
    """
    for line in source.splitlines():
        if len(line) > _MAX_LINE:
            continue
        if found := _FROM.fullmatch(line):
            module, names = found.groups()
            if module.strip("."):
                yield module, True
            else:
                yield from ((f"{module}{name}", False) for name in re.findall(r"\w+", names))
        elif found := _IMPORT.fullmatch(line):
            yield found[1], True


def _module_files(folder: str, module: str) -> list[str]:
    """Return the files that a relative import may mean; dots at the front, beyond the first, climb."""
    parts = folder.split("/") if folder else []
    while module.startswith("."):
        if not parts:
            return [f"../{module}"]
        parts, module = parts[:-1], module[1:]
    path = "/".join([*parts, *module.split(".")])
    return [f"{path}.py", f"{path}/__init__.py"]
