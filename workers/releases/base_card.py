"""What a model card says in its metadata: licence, language and the like, which hold for what is made of the model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
_TEXTS_ELSEWHERE = frozenset({"yes", "no", "on", "off"})
"""Truth values to YAML 1.1 and PyYAML; texts to YAML 1.2 and the Hub: `no` is Norwegian."""
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual|number")
"""What the Hub takes as a language."""
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCard:
    """The metadata of a base's card, or an adapter's, that a release may keep."""

    metadata: Mapping[str, str | list[str]] = field(default_factory=dict)
    """By field: a text, or a list of texts, as the card has it."""
    is_readable: bool = True
    left: tuple[str, ...] = field(default=(), compare=False)
    """Fields with values that no card of the Hub may have."""

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
    with file_errors(f"reading {path}", path):
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
    found = {key.value: value for key, value in root.value if key.value in _KEPT and not _is_empty(value)}
    kept = {name: _kept(value, whole=name.startswith("license")) for name, value in found.items()}
    metadata = _valid({name: value for name, value in kept.items() if value})
    told = {name: len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for name, value in found.items()}
    card = BaseCard(metadata=metadata)
    return replace(card, left=tuple(name for name in told if len(card.texts(name)) < told[name]))


def _is_empty(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null" or node.value in ("", [])


def _valid(metadata: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
    """Return metadata as the Hub takes it: it refuses the whole commit for one value that it does not know."""
    valid = dict(metadata)
    licences = BaseCard(metadata=metadata).texts("license")
    lower = [each.lower() for each in licences]
    if all(map(_LICENCE.fullmatch, lower)):
        if licences:
            valid["license"] = lower if isinstance(metadata["license"], list) else lower[0]
    else:
        name = BaseCard(metadata={"license": licences}).licence
        valid |= {"license": "other"} | ({"license_name": name} if name else {})
    if "license_name" in metadata and (name := BaseCard(metadata={"license": metadata["license_name"]}).licence):
        valid["license_name"] = name
    languages = [each for each in BaseCard(metadata=metadata).texts("language") if _LANGUAGE.fullmatch(each)]
    if languages:
        valid["language"] = languages if isinstance(metadata["language"], list) else languages[0]
    else:
        valid.pop("language", None)
    if isinstance(metadata.get("pipeline_tag"), list):
        del valid["pipeline_tag"]
    return valid


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


def _kept(node: yaml.Node, *, whole: bool) -> str | list[str] | None:
    """Return the text or the texts of a field, without what is none or acts on a terminal.

    Args:
        node: of the field.
        whole: whether the rest of a list says nothing where one of it is no text.

    Returns:
        None where it has no text, or too many.
    """
    if not isinstance(node, yaml.SequenceNode):
        return node.value if _is_text(node) else None
    texts = [each.value for each in node.value if _is_text(each)]
    return None if len(node.value) > _MAX_TEXTS or (whole and len(texts) < len(node.value)) else texts


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and (
        (node.tag == _TEXT_TAG and shown(node.value) == node.value) or node.value.lower() in _TEXTS_ELSEWHERE
    )
