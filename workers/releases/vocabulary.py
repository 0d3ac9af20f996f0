"""The tokenizer of a release against its model: ids without rows, and tokens to stop at.

A token beyond the rows of the embedding crashes the model, or reads memory of others. Which tokens a chat makes is in
its template; which ones end an answer is in the tokenizer, in the template, and in the generation configuration.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError
from jobs.request_files.problems import show
from workers.bases.tokenizers import TokenizerData, read_object

GENERATION_CONFIG = "generation_config.json"

_ALWAYS_MADE = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token")
"""Roles of tokens that a tokenizer makes of any text, or a model of its own."""
_NUM_NAMED = 4
_LOOKED_BACK = 48
"""Characters of a template before a token, in which the content of a message ends where the token ends a turn."""
_AFTER_CONTENT = re.compile(r"content[\w.'\"\])| ]{0,24}(\}\}|\+|~)[\s'\"{-]*$")
_ENDS_A_TURN = re.compile(
    r"(?<![a-z])(im_end|eot(_id)?|eom(_id)?|end[-_▁ ]?of[-_▁ ]?(turn|utterance|message)|turn[-_]?end)(?![a-z])"
    r"|^<\|end\|>$",
    re.IGNORECASE,
)
_MAX_PLACES = 10_000
"""Of tokens in one template that are looked at."""
_MAX_MARK_LENGTH = 64
"""Of a token that is looked for in a template; longer ones mark nothing there."""
_PLACEHOLDER = re.compile(r"\w+_token_(id|index)")
_NO_PLACEHOLDERS = frozenset(
    f"{role}_token_{kind}"
    for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start", "forced_bos", "forced_eos")
    for kind in ("id", "index")
)


def rows_note(
    tokenizer: TokenizerData, base: TokenizerData | None, config: Mapping[str, Any], num_rows: int
) -> Iterator[str]:
    """Tell of ids that the model has no rows for.

    Args:
        tokenizer: that ships.
        base: the base's; what is beyond the rows in it, too, is no fault of the adapter.
        config: `config.json` of the base; it names the ids that stand for images and sounds and are never embedded.
        num_rows: of the embedding that ships.

    Raises:
        BadInputError: a token beyond the rows is in a chat template, is made of every text, or is a special one that
            the adapter brings: the model would fail in use.
    """
    placeholders = set(_placeholders(config))
    beyond = {
        token: id_
        for token, id_ in tokenizer.counted.items()
        if id_ >= num_rows and not placeholders.intersection([id_])
    }
    if not beyond:
        return
    marks = [token for token in beyond if token in tokenizer.added or token in tokenizer.special]
    written = (token for template in tokenizer.templates for token, _ in _places(template, marks))
    in_template = next(written, None)
    needed = {role: token for role in _ALWAYS_MADE if (token := tokenizer.roles.get(role)) in beyond}
    new = [token for token in beyond if base is None or base.counted.get(token) != beyond[token]]
    special = [token for token in new if token in tokenizer.special]
    if in_template is not None:
        why, token = "the chat template writes it", in_template
    elif needed:
        role, token = next(iter(needed.items()))
        why = f"it is the {role}"
    elif special:
        why, token = "it is a special token", special[0]
    else:
        shown = ", ".join(f"{show(token)} ({beyond[token]})" for token in list(beyond)[:_NUM_NAMED])
        yield (
            f"the tokenizer has {len(beyond)} tokens with ids beyond the {num_rows} rows of the model's embedding: "
            f"{shown}{' and others' if len(beyond) > _NUM_NAMED else ''}; text that holds them makes the model fail"
        )
        return
    is_new = token in new
    advice = (
        "save the adapter with its resized embedding (save_embedding_layers=True), or remove its tokenizer files so "
        "that the base's are shipped"
        if is_new
        else "use a base whose embedding has a row for every token"
    )
    raise BadInputError(
        f"the {'adapter' if is_new else 'base'}'s tokenizer gives {show(token)} the id {beyond[token]}, {why}, and the "
        f"embedding of the merged model has {num_rows} rows, for ids up to {num_rows - 1}: the release would fail in "
        f"use ({len(beyond)} such tokens); {advice}"
    )


def stop_notes(tokenizer: TokenizerData, files: Mapping[str, Path], config: Mapping[str, Any]) -> Iterator[str]:
    """Tell of tokens that end an answer, and that generation does not stop at.

    Args:
        tokenizer: that ships.
        files: that ship, by name.
        config: `config.json` of the base, which says where to stop where there is no generation configuration.

    Raises:
        BadInputError: `generation_config.json` is no JSON.
    """
    generation = read_object(files[GENERATION_CONFIG]) if GENERATION_CONFIG in files else {}
    where, stops = GENERATION_CONFIG, _ids(generation.get("eos_token_id"))
    if not stops:
        where, stops = "config.json", _ids(config.get("eos_token_id")) or _ids(_text(config).get("eos_token_id"))
    if not stops:
        return
    last, ended = tokenizer.id_of("eos_token"), set[int]()
    if last is not None and last not in stops:
        ended.add(last)
        yield (
            f"the tokenizer ends at {show(tokenizer.roles['eos_token'])} (id {last}) and {where} stops at "
            f"{_named(stops, tokenizer)}: generation goes on where the model was taught to end; set eos_token_id to "
            "both in the base's generation_config.json, or when the model is served"
        )
    for token in _turn_ends(tokenizer):
        if tokenizer.ids[token] not in stops and tokenizer.ids[token] not in ended:
            ended.add(tokenizer.ids[token])
            yield (
                f"the chat template ends a turn with {show(token)} (id {tokenizer.ids[token]}) and {where} stops at "
                f"{_named(stops, tokenizer)}: an answer to a chat goes on after its end; add the id to eos_token_id in "
                "the base's generation_config.json, or when the model is served"
            )


def _turn_ends(tokenizer: TokenizerData) -> list[str]:
    """Return the tokens that a chat template ends a turn with: after the content, or by a name that says so."""
    marks = [token for token in tokenizer.special | tokenizer.added if len(token) > 1 and token in tokenizer.ids]
    ends = set[str]()
    for template in tokenizer.templates:
        for token, place in itertools.islice(_places(template, marks), _MAX_PLACES):
            before = template[max(0, place - _LOOKED_BACK) : place]
            if token not in ends and (_ENDS_A_TURN.search(token) or _AFTER_CONTENT.search(before)):
                ends.add(token)
    return sorted(ends)


def _places(template: str, tokens: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the tokens that a template holds, and where; it takes as long as the template, however many tokens."""
    by_length = defaultdict[int, set[str]](set)
    for token in tokens:
        if 0 < len(token) <= _MAX_MARK_LENGTH:
            by_length[len(token)].add(token)
    firsts = {token[0] for group in by_length.values() for token in group}
    for place in [place for place, character in enumerate(template) if character in firsts]:
        for length, group in by_length.items():
            if (token := template[place : place + length]) in group:
                yield token, place


def _named(ids: Sequence[int], tokenizer: TokenizerData) -> str:
    names = {id_: token for token, id_ in tokenizer.ids.items() if id_ in ids}
    return " and ".join(f"{show(names[id_])} (id {id_})" if id_ in names else f"id {id_}" for id_ in ids)


def _placeholders(config: Mapping[str, Any]) -> Iterator[int]:
    for field, value in config.items():
        if _PLACEHOLDER.fullmatch(field) and field not in _NO_PLACEHOLDERS and isinstance(value, int):
            yield value


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _ids(value: Any) -> list[int]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
