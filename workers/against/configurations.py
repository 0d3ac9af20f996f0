"""What is beside the weights: whether configuration, stops and tokenizer are still those of the release."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.bases.model import load_config
from workers.bases.tokenizers import read_tokenizer
from workers.files.checkpoint import read_json
from workers.files.foreign import foreign_sha256
from workers.releases.vocabulary import GENERATION_CONFIG
from workers.sources.belongings import is_template, is_tokenizer

_OF_NO_MATTER = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_name_or_path",
        "bos_token_id",
        "compression_config",
        "dtype",
        "pad_token_id",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields that say how a model was loaded or saved, not what it computes; `eos_token_id` is compared as stops."""
_TIE = "tie_word_embeddings"
_NUM_NAMED = 3
_MAX_VALUE = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What was found beside the weights."""

    wrong: tuple[str, ...]
    """A sentence for each disagreement that makes it another model."""
    notes: tuple[str, ...]
    """A sentence for each that a person should know."""


def compare_configurations(release: Path, checkpoint: Path) -> Agreement:
    """Compare what lies beside the weights.

    Args:
        release: its directory.
        checkpoint: its directory; its configuration was tried out.

    Raises:
        UnsupportedError, NotFoundError, BadInputError: a configuration cannot be read.
    """
    wrong, notes = [], []
    one, other = (dict(_flat(load_config(each).to_dict())) for each in (release, checkpoint))
    for field in sorted(one.keys() | other.keys()):
        last = field.rpartition(".")[2]
        if one.get(field) == other.get(field) or last == "eos_token_id":
            continue
        told = f"config.json: {field}: expected {_show(one.get(field))}, found {_show(other.get(field))}"
        if last in _OF_NO_MATTER:
            if last in ("bos_token_id", "pad_token_id"):
                notes.append(told)
        elif last == _TIE and one.get(field) and not other.get(field):
            notes.append(f"{told}: its head is stored apart, and was compared with the embedding")
        else:
            wrong.append(told)
    stops = [_stops(each) for each in (release, checkpoint)]
    if stops[0] != stops[1]:
        wrong.append(f"generation stops at other tokens: expected {stops[0]}, found {stops[1]} (eos_token_id)")
    if (release / GENERATION_CONFIG).is_file() and not (checkpoint / GENERATION_CONFIG).is_file():
        notes.append(f"{GENERATION_CONFIG} is missing")
    of_tokenizer = _compare_tokenizers(release, checkpoint)
    return Agreement(wrong=(*wrong, *of_tokenizer.wrong), notes=(*notes, *of_tokenizer.notes))


def _flat(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield fields of a configuration with their paths; those of no matter are not looked into."""
    for name, value in section.items():
        where = f"{path}{name}"
        if isinstance(value, dict) and name not in _OF_NO_MATTER:
            yield from _flat(value, f"{where}.")
        else:
            yield where, value


def _stops(directory: Path) -> list[int]:
    """Return the ids that end an answer: of the generation configuration where it has some, else of the model's."""
    if (directory / GENERATION_CONFIG).is_file():
        document = read_json(directory / GENERATION_CONFIG)
        if isinstance(document, dict) and (found := _ids(document.get("eos_token_id"))):
            return found
    config = load_config(directory)
    return _ids(getattr(config, "eos_token_id", None)) or _ids(getattr(config.get_text_config(), "eos_token_id", None))


def _ids(value: Any) -> list[int]:
    return sorted({each for each in (value if isinstance(value, list) else [value]) if type(each) is int})


def _compare_tokenizers(release: Path, checkpoint: Path) -> Agreement:
    ours, theirs = (_tokenizer_files(each) for each in (release, checkpoint))
    if not ours:
        return Agreement(wrong=(), notes=())
    wrong, notes = [], []
    missing = sorted(name for name in ours if name not in theirs)
    differ = sorted(name for name in ours if name in theirs and not _are_equal(ours[name], theirs[name]))
    added = sorted(name for name in theirs if name not in ours)
    for words, names in (("missing", missing), ("others than the release's", differ), ("new", added)):
        if names:
            notes.append(f"files of the tokenizer that are {words}: {', '.join(names)}")
    mine, found = read_tokenizer(ours), read_tokenizer(theirs)
    if mine is not None and found is None:
        notes.append("there is no tokenizer: take that of the release")
    elif mine is not None and found is not None:
        moved = sorted(t for t in mine.counted.keys() & found.counted.keys() if mine.counted[t] != found.counted[t])
        lost = sorted(mine.counted.keys() - found.counted.keys())
        if moved or lost:
            named = ", ".join(repr(token) for token in (moved or lost)[:_NUM_NAMED])
            what = f"{len(moved)} tokens have other ids" if moved else f"{len(lost)} tokens are gone"
            wrong.append(f"the tokenizer is another one: {what} ({named}); take that of the release")
        if mine.templates != found.templates:
            notes.append("the chat template is another one than the release's")
    return Agreement(wrong=tuple(wrong), notes=tuple(notes))


def _tokenizer_files(directory: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and (is_tokenizer(path.name) or is_template(path.name))
    }


def _are_equal(one: Path, other: Path) -> bool:
    if foreign_sha256(one) == foreign_sha256(other):
        return True
    return one.suffix == ".json" and bool(read_json(one) == read_json(other))


def _show(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}…"
