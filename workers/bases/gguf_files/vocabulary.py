"""The vocabulary of a GGUF file: tokens, what kind each is, how pieces are merged, which begin and end a text.

Read from `tokenizer.json`, which is what transformers goes by. Two kinds are written: byte-level BPE (`gpt2`), and what
sentencepiece made (`llama`): BPE over characters that falls back to bytes. llama.cpp merges the latter by the score of
what a merge makes; the scores here are the ranks of the merges, and a tokenizer in which the two would differ is
refused.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from gguf.constants import Keys, TokenType

from jobs.errors import BadInputError, UnsupportedError
from workers.bases.gguf_files.architectures import ADVICE
from workers.bases.gguf_files.pre_tokenizers import pre_of
from workers.bases.gguf_files.special_tokens import SpecialTokens, read_special_tokens
from workers.files.foreign_json import parse_json
from workers.sources.belongings import TOKENIZER_FILE

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_USER_SCORE = -1000.0
"""Of added tokens, which no merge makes: what llama.cpp's converter gives them."""
_LOOKS_SPECIAL = re.compile(r"<([|\uff5c]).*\1>|<unused\d+>|<mask>|<pad>|<2mass>|\[@BOS@\]", re.DOTALL)
"""Added tokens that llama.cpp's converter takes for control whatever their file says (`does_token_look_special`)."""
_NO_LETTER = re.compile(r"[^A-Za-z0-9]")
"""Of a name: what GGUF has no room for in the name of a template."""
_SPACE_IN_MERGES = chr(ord(" ") + 256)
"""What byte-level BPE writes for a space."""
_NEUTRAL = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
"""Of a BPE model: they have to say nothing."""
_NUM_KEPT = 4

Contents = tuple[tuple[str, bytes], ...]
"""Files by name: `tokenizer.json`, and what of `tokenizer_config.json`, `config.json` and templates there is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vocabulary:
    """What a file says of tokens."""

    model: str
    """`tokenizer.ggml.model`: how llama.cpp makes tokens of text."""
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None
    """Of `llama`."""
    adds_space: bool | None
    """Of `llama`: whether a space goes before the text."""
    merges: tuple[str, ...] | None
    """Of `gpt2`."""
    special: SpecialTokens

    def write(self, writer: GGUFWriter) -> None:
        """Put it into the metadata of a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.adds_space is not None:
            writer.add_add_space_prefix(self.adds_space)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, id_ in self.special.ids.items():
            getattr(writer, f"add_{role}_token_id")(id_)
        for role, adds in self.special.adds.items():
            getattr(writer, f"add_add_{role}_token")(adds)
        templates = dict(sorted(self.special.templates.items()))
        if "default" in templates:
            writer.add_chat_template(templates.pop("default"))
        for name, template in templates.items():
            writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=_NO_LETTER.sub("_", name)), template)
        # By itself gguf 0.19 lists names in the order of a set, which no two processes share.
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, [_NO_LETTER.sub("_", name) for name in templates])


@functools.lru_cache(maxsize=_NUM_KEPT)
def read_vocabulary(place: Path, contents: Contents, num_rows: int) -> Vocabulary:
    """Read the vocabulary of a release.

    Args:
        place: where it is from, for messages.
        contents: its files.
        num_rows: of the embedding: ids beyond the tokens become tokens that no text has.

    Raises:
        UnsupportedError: llama.cpp would make other tokens of it, or that is not known; says what to do.
        BadInputError: it contradicts itself.
    """
    files = dict(contents)
    if TOKENIZER_FILE not in files:
        raise UnsupportedError(
            f"{place}: expected {TOKENIZER_FILE}, which a GGUF file's vocabulary is made of, found none; load the "
            "tokenizer by transformers and save it with the base, or leave output out"
        )
    document = parse_json(files[TOKENIZER_FILE], place / TOKENIZER_FILE)
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or any(model.get(each) for each in _NEUTRAL):
        kind = model.get("type") if isinstance(model, dict) else None
        raise UnsupportedError(f"{place / TOKENIZER_FILE}: expected a plain BPE model, found {kind}; {ADVICE}")
    added = {token["id"]: token for token in document.get("added_tokens") or ()}
    by_id = {id_: token for token, id_ in model["vocab"].items()} | {
        id_: each["content"] for id_, each in added.items()
    }
    if by_id and max(by_id) >= num_rows:
        raise BadInputError(
            f"{place / TOKENIZER_FILE}: token {by_id[max(by_id)]!r} has id {max(by_id)}, and the embedding has "
            f"{num_rows} rows; a GGUF file has a row for each token"
        )
    by_bytes = bool(model.get("byte_fallback"))
    pre = "default" if by_bytes else pre_of(document)
    if pre is None:
        raise UnsupportedError(
            f"{place / TOKENIZER_FILE}: expected a pre_tokenizer of which llama.cpp's name (tokenizer.ggml.pre) is "
            f"known, found another; {ADVICE}"
        )
    unknown = model.get("unk_token") if by_bytes else None
    return Vocabulary(
        model="llama" if by_bytes else "gpt2",
        pre=pre,
        tokens=tuple(by_id.get(id_, f"[PAD{id_}]") for id_ in range(num_rows)),
        types=tuple(_type_of(id_, by_id, added, by_bytes, unknown) for id_ in range(num_rows)),
        scores=_scores(place, model, by_id, added, num_rows) if by_bytes else None,
        adds_space=_adds_space(place, document) if by_bytes else None,
        merges=None if by_bytes else tuple(_merges(model["merges"])),
        special=read_special_tokens(place, files, document, num_rows),
    )


def _type_of(
    id_: int, by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], by_bytes: bool, unknown: str | None
) -> TokenType:
    if id_ not in by_id:
        return TokenType.UNUSED
    token = by_id[id_]
    if token == unknown and unknown is not None:
        return TokenType.UNKNOWN
    if by_bytes and _BYTE.fullmatch(token):
        return TokenType.BYTE
    if id_ not in added:
        return TokenType.NORMAL
    is_special = added[id_].get("special") or _LOOKS_SPECIAL.fullmatch(token)
    return TokenType.CONTROL if is_special else TokenType.USER_DEFINED


def _scores(
    place: Path,
    model: Mapping[str, Any],
    by_id: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    num_rows: int,
) -> tuple[float, ...]:
    """Return scores by which pieces are merged in the order of the merges.

    Raises:
        UnsupportedError: merges of one piece lie apart, so that no score stands for all of them.
    """
    ranks: dict[str, int] = {}
    last = ""
    for rank, merge in enumerate(model["merges"]):
        piece = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)
        if piece in ranks and piece != last:
            raise UnsupportedError(
                f"{place / TOKENIZER_FILE}: merges of {piece!r} lie apart, and llama.cpp has one score for each token; "
                f"{ADVICE}"
            )
        ranks.setdefault(piece, rank)
        last = piece
    lowest = -float(len(model["merges"]))

    def score(id_: int) -> float:
        token = by_id.get(id_)
        if token is None or (id_ in added and not added[id_].get("special")):
            return _USER_SCORE
        if id_ in added or _BYTE.fullmatch(token):
            return 0.0
        return -float(ranks[token]) if token in ranks else lowest

    return tuple(score(id_) for id_ in range(num_rows))


def _adds_space(place: Path, document: Mapping[str, Any]) -> bool:
    """Return whether a space goes before a text that sentencepiece splits.

    Raises:
        UnsupportedError: the text goes through something else.
    """
    normalizer, splitter = document.get("normalizer"), document.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if splitter is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return True
    if normalizer is None and isinstance(splitter, dict) and splitter.get("type") == "Metaspace":
        scheme = splitter.get("prepend_scheme")
        if splitter.get("replacement") == _SPACE and splitter.get("split") is False and scheme in _SCHEMES:
            return bool(scheme != "never")
    raise UnsupportedError(
        f"{place / TOKENIZER_FILE}: expected spaces to become {_SPACE} and nothing else, found another normalizer or "
        f"pre_tokenizer; {ADVICE}"
    )


_SCHEMES = ("first", "always", "never")


def _merges(found: Sequence[Any]) -> Iterator[str]:
    """Yield merges as text: two pieces with a space between, and those within as the letter that stands for them."""
    for merge in found:
        if isinstance(merge, str):
            yield merge
        else:
            yield " ".join(piece.replace(" ", _SPACE_IN_MERGES) for piece in merge)
