"""The code that a release has: copied as data, never run here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import BadInputError
from workers.files.foreign import foreign_sha256
from workers.files.local import file_errors
from workers.sources.belongings import MODULES_FILE, documents, modules_code
from workers.sources.code_files import code_of
from workers.sources.listing import LocalFiles


@dataclass(frozen=True, slots=True)
class _Overlay:
    """The code of an adapter, and behind it that of its base."""

    front: LocalFiles
    back: LocalFiles

    def has(self, name: str) -> bool:
        return self.front.has(name) or self.back.has(name)

    def read(self, name: str) -> bytes:
        return (self.front if self.front.has(name) else self.back).read(name)


def shipped_code(
    base: Path, adapter: Path, of_base: Mapping[str, Path], from_adapter: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the code that the release has, by name, and the references to code that is missing."""
    ours, theirs = LocalFiles(base), LocalFiles(adapter)
    named = code_of({name: text for name, text in documents(ours).items() if name not in from_adapter}, ours)
    # What a tokenizer was saved without it finds beside the base.
    brought = {name: text for name, text in documents(theirs).items() if name in from_adapter}
    named_by_adapter = code_of(brought, _Overlay(theirs, ours))
    of_modules = modules_code(theirs, _Overlay(theirs, ours)) if MODULES_FILE in from_adapter else frozenset()
    found = [*named.values(), *named_by_adapter.values()]
    whole = {name for each in found if not each.missing for name in each.files}
    useless = {name for each in found if each.missing for name in each.files} - whole
    code = {name: path for name, path in of_base.items() if name.endswith(".py") and name not in useless}
    for name in sorted({name for each in named_by_adapter.values() for name in each.files} - useless | of_modules):
        path = (adapter if theirs.has(name) else base) / name
        with file_errors(f"reading {path}", path):
            num_parts = name.count("/") + 1
            if name in code and foreign_sha256(path, num_parts=num_parts) != foreign_sha256(
                code[name], num_parts=num_parts
            ):
                raise BadInputError(
                    f"{path} and {code[name]} differ, and the release has one {name}; remove one of them"
                )
        code.setdefault(name, path)
    missing = {reference: each.missing for reference, each in (named | named_by_adapter).items() if each.missing}
    return code, missing
