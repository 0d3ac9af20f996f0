"""Tokenizers as data: which ids they make, which of those are special, and the chat templates beside them.

Files are parsed as JSON and text; no tokenizer is built of them and no template rendered, as their patterns,
normalizers and loops are their authors'.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError
from workers.bases.vocabulary_files import is_pieces, read_pieces
from workers.files.checkpoint import read_json
from workers.files.foreign import read_foreign
from workers.files.local import FileState, file_errors
from workers.sources.belongings import TOKENIZER_CONFIG, TOKENIZER_FILE, is_template

_MAX_TEMPLATE_SIZE = 256 << 10
"""In characters; the longest in use have a tenth of it."""
_NUM_KEPT = 4
"""Vocabularies kept in memory: that of a base is asked for with every adapter."""
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What a file says of tokens and their ids."""

    ids: Mapping[str, int]
    """By token, added ones not counted."""
    added: Mapping[str, int]
    special: frozenset[str]
    digest: str
    """Of `ids`."""


_NOTHING = _Vocabulary({}, {}, frozenset(), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerData:
    """A tokenizer, as its files describe it."""

    ids: Mapping[str, int]
    """By token."""
    counted: Mapping[str, int]
    """By token, where its place in a file tells its id or less: some classes put tokens of their own in front."""
    roles: Mapping[str, str]
    """Tokens by what they are for: `eos_token` and the like."""
    special: frozenset[str]
    """Tokens that stand for no text, those with a role among them."""
    templates: tuple[str, ...]
    """Chat templates, as they are written."""
    added: frozenset[str]
    """Tokens that were added to the vocabulary."""

    def id_of(self, role: str) -> int | None:
        """Return the id of the token with a role, or None where there is none."""
        return self.ids.get(self.roles.get(role, ""))


def same_tokens(one: Path, other: Path) -> bool:
    """Return whether two files `tokenizer.json` have one vocabulary, tokens that were added to it not counted.

    Raises:
        BadInputError: one of them is no JSON, or too large.
    """
    return _read(one).digest == _read(other).digest


def read_tokenizer(files: Mapping[str, Path]) -> TokenizerData | None:
    """Read what the files of a tokenizer say of its tokens.

    Args:
        files: of a checkpoint, by name.

    Returns:
        None where there is no tokenizer.

    Raises:
        BadInputError: a file is no JSON, or too large.
    """
    pieces = next((name for name in files if is_pieces(name)), None)
    if TOKENIZER_CONFIG not in files and TOKENIZER_FILE not in files and pieces is None:
        return None
    whole = next((files[name] for name in (TOKENIZER_FILE, "vocab.json") if name in files), None)
    vocabulary = _NOTHING if whole is None else _read(whole)
    counted = read_pieces(files[pieces]) if whole is None and pieces is not None else {}
    config, mapped, added_later = (
        _object(files, name) for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
    )
    added = {**vocabulary.added, **{token: id_ for token, id_ in added_later.items() if isinstance(id_, int)}}
    special = set(vocabulary.special)
    for id_, token in _decoder(config):
        added[token["content"]] = id_
        if token.get("special"):
            special.add(token["content"])
    named = mapped | config
    roles = {role: content for role in _ROLES if (content := _content(named.get(role))) is not None}
    special.update(roles.values(), _more_special(named))
    return TokenizerData(
        ids={**vocabulary.ids, **added},
        counted={**counted, **vocabulary.ids, **added},
        roles=roles,
        special=frozenset(special),
        templates=tuple(_templates(files, config)),
        added=frozenset(added),
    )


def _read(path: Path) -> _Vocabulary:
    with file_errors(f"reading {path}", path):
        return _read_once(path, FileState.of(path.stat()))


@functools.lru_cache(maxsize=_NUM_KEPT)
def _read_once(path: Path, _: FileState) -> _Vocabulary:
    document = read_object(path) if path.name == TOKENIZER_FILE else read_json(path)
    # Some models keep an alphabet under the name of a vocabulary.
    return _parse(document) if isinstance(document, dict) else _NOTHING


def _parse(document: dict[str, Any]) -> _Vocabulary:
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else document
    if isinstance(vocabulary, list):  # unigram: pieces with their scores, by id
        pieces = [piece[0] for piece in vocabulary if isinstance(piece, list) and piece]
        ids = {piece: id_ for id_, piece in enumerate(pieces) if isinstance(piece, str)}
    else:
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
        ids = {token: id_ for token, id_ in pairs if isinstance(id_, int)}
    tokens = [token for token in _list(document.get("added_tokens")) if _is_token(token)]
    added = {token["content"]: token["id"] for token in tokens if isinstance(token.get("id"), int)}
    in_order = sorted(ids.items(), key=lambda pair: (pair[1], pair[0]))
    digest = hashlib.sha256(json.dumps(in_order).encode()).hexdigest()
    return _Vocabulary(ids, added, frozenset(token["content"] for token in tokens if token.get("special")), digest)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of limited size.

    Raises:
        BadInputError: it is none, or too large.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise BadInputError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _object(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_object(files[name]) if name in files else {}


def _decoder(config: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    decoder = config.get("added_tokens_decoder")
    for id_, token in decoder.items() if isinstance(decoder, dict) else ():
        if id_.isascii() and id_.isdigit() and len(id_) < 10 and _is_token(token):
            yield int(id_), token


def _more_special(named: Mapping[str, Any]) -> Iterator[str]:
    """Yield special tokens beyond the roles: those of images and sounds, and those that only the model knows."""
    for field_, value in named.items():
        if field_ in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
            tokens = value.values() if isinstance(value, dict) else _list(value)
            yield from (content for token in tokens if (content := _content(token)) is not None)
        elif field_.endswith("_token") and (content := _content(value)) is not None:
            yield content


def _templates(files: Mapping[str, Path], config: Mapping[str, Any]) -> Iterator[str]:
    beside = {name: path for name, path in files.items() if is_template(name)}
    for name, path in beside.items():
        if name.endswith(".json"):
            yield from _texts(read_object(path).get("chat_template"), path)
        else:
            text = read_foreign(path, num_parts=name.count("/") + 1).decode(errors="replace")
            _check_template(path, len(text))
            yield text
    if not beside:  # a file wins over what the configuration holds
        yield from _texts(config.get("chat_template"), files.get(TOKENIZER_CONFIG))


def _texts(value: Any, path: object) -> Iterator[str]:
    """Yield the templates of a field: one, several by name, or a list of them with their names."""
    if isinstance(value, dict):
        found = list(value.values())
    else:
        found = [each.get("template") if isinstance(each, dict) else each for each in (_list(value) or [value])]
    texts = [each for each in found if isinstance(each, str)]
    _check_template(path, sum(map(len, texts)))
    yield from texts


def _check_template(path: object, size: int) -> None:
    if size > _MAX_TEMPLATE_SIZE:
        raise BadInputError(f"{path}: expected chat templates of at most {_MAX_TEMPLATE_SIZE} characters, found {size}")


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _is_token(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
