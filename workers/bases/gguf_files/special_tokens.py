"""What goes around texts: special ids, whether a text begins and ends with one of them, and chat templates.

Read from the files beside `tokenizer.json` as `gguf.SpecialVocab` reads them, which wants a folder that holds all of
them; those of a release come from two, and planning writes no file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import UnsupportedError
from workers.bases.gguf_files.architectures import ADVICE
from workers.files.foreign_json import parse_json
from workers.sources.belongings import OLD_TEMPLATE, TEMPLATE_FOLDER, TOKENIZER_CONFIG, TOKENIZER_FILE

_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """What goes around texts."""

    ids: Mapping[str, int]
    """By role: `bos`, `eos` and so on."""
    adds: Mapping[str, bool]
    """Whether the tokenizer adds the token of a role by itself."""
    templates: Mapping[str, str]
    """Chat templates by name; the usual one is `default`."""


def read_special_tokens(
    place: Path, files: Mapping[str, bytes], document: Mapping[str, Any], num_rows: int
) -> SpecialTokens:
    """Read what goes around texts.

    Args:
        place: where the files are from, for messages.
        files: of a tokenizer, and `config.json`, by name.
        document: `tokenizer.json`, its model BPE.
        num_rows: of the embedding; ids beyond are passed over.

    Raises:
        UnsupportedError: the tokenizer puts other tokens around a text than one that begins and one that ends it.
    """
    config, model = _object(place, files, TOKENIZER_CONFIG), _object(place, files, CONFIG)
    text_config = model.get("text_config")
    model = {**(text_config if isinstance(text_config, dict) else {}), **model}
    added = {each["content"]: each["id"] for each in document.get("added_tokens") or ()}
    ids = dict[str, int]()
    for role in _ROLES:
        named = config.get(f"{role}_token")
        content = named.get("content") if isinstance(named, dict) else named
        id_ = added.get(content) if isinstance(content, str) else None
        id_ = model.get(f"{role}_token_id") if id_ is None else id_
        if isinstance(id_, int) and 0 <= id_ < num_rows:
            ids[role] = id_
    every = {**document["model"]["vocab"], **added}
    adds = dict[str, bool]()
    for role, tokens in zip(("bos", "eos"), _around(document.get("post_processor")), strict=True):
        said = config.get(f"add_{role}_token")
        if not isinstance(said, bool) and tokens and [every.get(token) for token in tokens] != [ids.get(role)]:
            raise UnsupportedError(
                f"{place / TOKENIZER_FILE}: expected a text to begin with its bos token and to end with its eos token, "
                f"or neither, found {', '.join(tokens)}; {ADVICE}"
            )
        # Said in any case: where it is not, llama.cpp goes by the kind of the vocabulary.
        adds[role] = said if isinstance(said, bool) else bool(tokens)
    return SpecialTokens(ids=ids, adds=adds, templates=_templates(place, files, config))


def _templates(place: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return chat templates by their names: that of the configuration goes before those in files of their own."""
    said = config.get("chat_template")
    if said is None and TEMPLATE in files:
        beside = {
            Path(name).stem: content.decode()
            for name, content in files.items()
            if name.startswith(f"{TEMPLATE_FOLDER}/") and name.endswith(".jinja")
        }
        return {"default": files[TEMPLATE].decode(), **beside}
    if said is None:
        said = _object(place, files, OLD_TEMPLATE).get("chat_template")
    if isinstance(said, str):
        return {"default": said}
    several = said if isinstance(said, list) else ()
    return {each["name"]: each["template"] for each in several}


def _object(place: Path, files: Mapping[str, bytes], name: str) -> Mapping[str, Any]:
    found = parse_json(files[name], place / name) if name in files else {}
    return found if isinstance(found, dict) else {}


def _around(processor: Any) -> tuple[Sequence[str], Sequence[str]]:
    """Return the tokens that a post-processor puts before a text and behind it."""
    before, behind = list[str](), list[str]()
    for each in _processors(processor):
        if each.get("type") == "TemplateProcessing":
            parts = each.get("single") or ()
            place = next((index for index, part in enumerate(parts) if "Sequence" in part), len(parts))
            before += [part["SpecialToken"]["id"] for part in parts[:place]]
            behind += [part["SpecialToken"]["id"] for part in parts[place + 1 :] if "SpecialToken" in part]
        elif each.get("type") in ("RobertaProcessing", "BertProcessing"):
            before.append(each["cls"][0])
            behind.append(each["sep"][0])
    return before, behind


def _processors(found: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(found, dict):
        if found.get("type") == "Sequence":
            for each in found.get("processors") or ():
                yield from _processors(each)
        else:
            yield found
