"""What a model card says in its metadata: licence, language and the like, which hold for what is made of the model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jobs.text import shown
from workers.files.foreign import read_foreign
from workers.files.local import file_errors
from workers.sources.belongings import CARD_NAME

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags", "base_model")
_MAX_METADATA_CHARACTERS = 64 << 10
"""Evaluation results left out: those of large benchmarks have megabytes, and are the base's own."""
_MAX_CARD_BYTES = 16 << 20
_MAX_DEPTH = 60
_MAX_TEXTS = 1_000
"""Of one field, such as tags."""
_NO_SLUG = re.compile(r"[^a-z0-9.]+")
"""In a `license_name`, as the Hub takes it."""
_TEXT_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCard:
    """The metadata of a base's card, or an adapter's, that a release may keep."""

    metadata: Mapping[str, str | list[str]] = field(default_factory=dict)
    """By field: a text, or a list of texts, as the card has it."""
    is_readable: bool = True

    def texts(self, name: str) -> list[str]:
        """Return what a field holds, as a list."""
        value = self.metadata.get(name, [])
        return [value] if isinstance(value, str) else list(value)

    @property
    def licence(self) -> str | None:
        """The licence, by the name that a licence has which is none of the Hub's."""
        words = self.texts("license_name") if self.texts("license") == ["other"] else self.texts("license")
        return _NO_SLUG.sub("-", "-".join(words or self.texts("license")).lower()).strip("-") or None


def differing_licences(base: BaseCard, adapters: Sequence[BaseCard]) -> tuple[str, ...]:
    """Return the licences of a base and its adapters, the base's first, where one of an adapter is not the base's."""
    told = [card.licence for card in adapters if card.licence]
    if all(licence == base.licence for licence in told):
        return ()
    return tuple(dict.fromkeys((base.licence or "unknown", *told)))


def read_base_card(directory: Path) -> BaseCard:
    """Read the metadata of the card in the directory of a base or an adapter; it is empty where there is none.

    One that is no YAML, or far too large, is not readable and says nothing.
    """
    path = directory / CARD_NAME
    if not path.is_file():
        return BaseCard()
    with file_errors(f"reading {path}"):
        if path.stat().st_size > _MAX_CARD_BYTES:
            return BaseCard(is_readable=False)
    text = read_foreign(path).decode(errors="replace")
    block = _metadata_block(text)
    if block is None:
        return BaseCard()
    return _read_block(block)


def _read_block(block: str) -> BaseCard:
    if len(block) > _MAX_METADATA_CHARACTERS:
        return BaseCard(is_readable=False)
    try:
        root = yaml.compose(block, Loader=_Loader)
    except yaml.YAMLError:
        return BaseCard(is_readable=False)
    if not isinstance(root, yaml.MappingNode):
        return BaseCard(is_readable=root is None)
    found = {key.value: _kept(value) for key, value in root.value if key.value in _KEPT}
    return BaseCard(metadata={name: value for name, value in found.items() if value})


def _metadata_block(text: str) -> str | None:
    """Return the metadata of a card, evaluation results left out; None where it has none."""
    lines = text.removeprefix("\ufeff").lstrip().splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    kept: list[str] = []
    is_kept = True
    for line in lines[1:]:
        if line.rstrip() == "---":
            return "\n".join(kept) if any(kept) else None
        if line[:1] not in ("", " ", "\t", "-", "#"):
            is_kept = not line.startswith("model-index:")
        if is_kept:
            kept.append(line)
    return None


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Composes nodes and makes no values of them: aliases are not followed, tags and numbers mean nothing."""

    depth = 0

    def descend_resolver(self, _node: yaml.Node | None, _index: Any) -> None:
        """Refuse what lies too deep; its C code would exhaust the stack."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError

    def ascend_resolver(self) -> None:
        """Come up again."""
        self.depth -= 1


def _kept(node: yaml.Node) -> str | list[str] | None:
    """Return the text or the texts of a field; None where it has others, too many, or what acts on a terminal."""
    texts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if len(texts) > _MAX_TEXTS or not all(each.tag == _TEXT_TAG and shown(each.value) == each.value for each in texts):
        return None
    values = [each.value for each in texts]
    return values if isinstance(node, yaml.SequenceNode) else values[0]
