"""What a model is asked to prove itself: the prompts of a request as token ids of the merged checkpoint's tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs.errors import BadInputError
from jobs.request import DEFAULT_PROMPTS, HeldOutText, MergeRequest
from workers.inference import quiet_libraries
from workers.model import load_config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

_DRAWN_LENGTH = 12
_DRAWN_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Texts and their token ids, computed once: every model of a comparison sees the same ids."""

    texts: tuple[str, ...]
    """As shown in the report; of a checkpoint without a tokenizer, the ids themselves."""
    token_ids: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Token ids of the request's held-out texts: what is given, one token at least, and what counts."""
    tokenizer: PreTrainedTokenizerBase | None

    def show(self, token_ids: Sequence[int]) -> str:
        """Return a continuation as text, or as its ids where there is no tokenizer."""
        if self.tokenizer is None:
            return _show_ids(token_ids)
        return str(self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))


def read_prompts(request: MergeRequest, merged: Path) -> Prompts:
    """Turn the prompts of a request into token ids.

    Args:
        request: its prompts, and how long a continuation is.
        merged: merged checkpoint. Where it has no tokenizer, the prompts are random ids, drawn with a fixed seed.

    Raises:
        BadInputError: the request has prompts or texts of its own and the checkpoint no tokenizer; the tokenizer cannot
            be loaded or does not fit the model; a prompt or text is empty or too long for the model.
    """
    config = load_config(merged).get_text_config()
    if not any((merged / name).exists() for name in _TOKENIZER_FILES):
        return _draw(request, merged, config.vocab_size)
    tokenizer = _load_tokenizer(merged)

    def tokenize(text: str) -> tuple[int, ...]:
        # What a chat template has rendered begins with the token that the tokenizer would put before it once more.
        begun = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
        return tuple(tokenizer(text, add_special_tokens=not begun)["input_ids"])

    def encode(field: str, text: str, num_new: int, at_least: int) -> tuple[int, ...]:
        ids = tokenize(text)
        if len(ids) < at_least:
            raise BadInputError(f"parity.{field}: {text!r} has {len(ids) or 'no'} tokens, expected {at_least} or more")
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and len(ids) + num_new > longest:
            more = f"; with max_new_tokens {num_new} that is" if num_new else ","
            raise BadInputError(
                f"parity.{field}: {text[:40]!r}… has {len(ids)} tokens{more} more than the {longest} positions of "
                f"{merged.name}"
            )
        if max(ids) >= config.vocab_size:
            raise BadInputError(
                f"{merged}: the tokenizer gives token {max(ids)}, the model has {config.vocab_size}; base and "
                "tokenizer do not belong together"
            )
        return ids

    def split(text: HeldOutText) -> tuple[tuple[int, ...], tuple[int, ...]]:
        whole = encode("texts", text.prompt + text.completion, 0, 2)
        given = tokenize(text.prompt) if text.prompt else ()
        num_given = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, given, strict=False)))
        # The first token follows nothing, and has no likelihood; the last one always counts.
        num_given = min(max(num_given, 1), len(whole) - 1)
        return whole[:num_given], whole[num_given:]

    parity = request.parity
    return Prompts(
        texts=parity.prompts,
        token_ids=tuple(encode("prompts", prompt, parity.max_new_tokens, 1) for prompt in parity.prompts),
        held_out=tuple(split(text) for text in parity.texts),
        tokenizer=tokenizer,
    )


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise BadInputError(f"{directory}: transformers cannot load its tokenizer: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _draw(request: MergeRequest, merged: Path, vocab_size: int) -> Prompts:
    if request.parity.prompts != DEFAULT_PROMPTS or request.parity.texts:
        given = "texts" if request.parity.texts else "prompts"
        raise BadInputError(
            f"parity.{given} are given, but {merged.name} has no tokenizer to read them with; leave them out, or add a "
            "tokenizer to the base or the adapter"
        )
    generator = torch.Generator().manual_seed(_DRAWN_SEED)
    drawn = torch.randint(vocab_size, (len(DEFAULT_PROMPTS), _DRAWN_LENGTH), generator=generator).tolist()
    token_ids = tuple(map(tuple, drawn))
    return Prompts(texts=tuple(map(_show_ids, token_ids)), token_ids=token_ids, held_out=(), tokenizer=None)


def _show_ids(token_ids: Sequence[int]) -> str:
    return "token ids " + " ".join(map(str, token_ids))
