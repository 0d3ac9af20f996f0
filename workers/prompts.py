"""What a model is asked to prove itself: the prompts of a request as token ids of the merged checkpoint's tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs.errors import BadInputError
from jobs.request import DEFAULT_PROMPTS, MergeRequest
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
        BadInputError: the request has prompts of its own and the checkpoint no tokenizer; the tokenizer cannot be
            loaded or does not fit the model; a prompt is empty or too long for the model.
    """
    config = load_config(merged).get_text_config()
    if not any((merged / name).exists() for name in _TOKENIZER_FILES):
        return _draw(request, merged, config.vocab_size)
    tokenizer = _load_tokenizer(merged)
    prompts = request.parity.prompts
    token_ids = tuple(tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    longest = getattr(config, "max_position_embeddings", None)
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if not ids:
            raise BadInputError(f"parity.prompts: {prompt!r} has no tokens; give a longer prompt")
        if longest is not None and len(ids) + request.parity.max_new_tokens > longest:
            raise BadInputError(
                f"parity.prompts: {prompt[:40]!r}… has {len(ids)} tokens; with max_new_tokens "
                f"{request.parity.max_new_tokens} that is more than the {longest} positions of {merged.name}"
            )
        if max(ids) >= config.vocab_size:
            raise BadInputError(
                f"{merged}: the tokenizer gives token {max(ids)}, the model has {config.vocab_size}; base and "
                "tokenizer do not belong together"
            )
    return Prompts(texts=prompts, token_ids=token_ids, tokenizer=tokenizer)


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise BadInputError(f"{directory}: transformers cannot load its tokenizer: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _draw(request: MergeRequest, merged: Path, vocab_size: int) -> Prompts:
    if request.parity.prompts != DEFAULT_PROMPTS:
        raise BadInputError(
            f"parity.prompts are given, but {merged.name} has no tokenizer to read them with; leave them out, or add a "
            "tokenizer to the base or the adapter"
        )
    generator = torch.Generator().manual_seed(_DRAWN_SEED)
    drawn = torch.randint(vocab_size, (len(DEFAULT_PROMPTS), _DRAWN_LENGTH), generator=generator).tolist()
    token_ids = tuple(map(tuple, drawn))
    return Prompts(texts=tuple(map(_show_ids, token_ids)), token_ids=token_ids, tokenizer=None)


def _show_ids(token_ids: Sequence[int]) -> str:
    return "token ids " + " ".join(map(str, token_ids))
