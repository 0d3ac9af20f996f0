"""What a base's model card says in its metadata: licence, language and the like, which hold for what is made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from workers.belongings import CARD_NAME
from workers.files import file_errors
from workers.foreign import read_foreign

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags", "base_model")
_MAX_METADATA_CHARACTERS = 64 << 10
"""Evaluation results left out: those of large benchmarks have megabytes, and are the base's own."""
_MAX_CARD_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCard:
    """The metadata of a base's card that a release may keep."""

    metadata: Mapping[str, str | list[str]] = field(default_factory=dict)
    """By field: a text, or a list of texts, as the card has it."""
    is_readable: bool = True

    def texts(self, name: str) -> list[str]:
        """Return what a field holds, as a list."""
        value = self.metadata.get(name, [])
        return [value] if isinstance(value, str) else list(value)


def read_base_card(directory: Path) -> BaseCard:
    """Read the metadata of the card in a base's directory; it is empty where there is none.

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
    if len(block) > _MAX_METADATA_CHARACTERS:
        return BaseCard(is_readable=False)
    try:
        card: Any = ModelCard(f"---\n{block}\n---\n", ignore_metadata_errors=True)
        found = {name: getattr(card.data, name, None) for name in _KEPT}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return BaseCard(is_readable=False)
    return BaseCard(metadata={name: value for name, value in found.items() if value and _is_text(value)})


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


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
