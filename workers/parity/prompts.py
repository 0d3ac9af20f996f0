"""What a model is asked to prove itself: the prompts of a request as token ids of the merged checkpoint's tokenizer."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs.errors import BadInputError
from jobs.parity_policy import DEFAULT_PROMPTS, HeldOutText
from jobs.request import MergeRequest
from workers.bases.model import load_config
from workers.parity.chat import Rendering, how_asked, render_chat
from workers.parity.inference import quiet_libraries
from workers.parity.passages import PASSAGES
from workers.parity.positions import Asked, Selection, num_shared, select

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

_DRAWN_LENGTH = 12
_DRAWN_FURTHER_LENGTH = 48
_DRAWN_SEED = 0

LONGEST_BUILT_IN = max(len(" ".join(passage).encode()) for passage in PASSAGES)
"""Bytes of the longest built-in prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Texts and their token ids, computed once: every model of a comparison sees the same ids."""

    texts: tuple[str, ...]
    """As shown in the report; of a checkpoint without a tokenizer, the ids themselves."""
    token_ids: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Token ids of the request's held-out texts: what is given, one token at least, and what counts."""
    tokenizer: PreTrainedTokenizerBase | None
    nums_shared: tuple[int, ...]
    """Tokens at the beginning of each prompt that an earlier one has, too: nothing is compared after them again."""
    remarks: tuple[str, ...]
    """How they are asked, for the report."""

    def show(self, token_ids: Sequence[int]) -> str:
        """Return a continuation as text, or as its ids where there is no tokenizer."""
        if self.tokenizer is None:
            return _show_ids(token_ids)
        return str(self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))


def read_prompts(request: MergeRequest, merged: Path, source: str | None = None) -> Prompts:
    """Turn the prompts of a request into token ids: through the chat template where the checkpoint has one.

    Args:
        request: its prompts, how many positions to compare, and how long a continuation is.
        merged: merged checkpoint. Where it has no tokenizer, the prompts are random ids, drawn with a fixed seed.
        source: what messages call the place that tokenizer and configuration are from; None for the checkpoint itself.

    Raises:
        BadInputError: the request has prompts or texts of its own and the checkpoint no tokenizer; the tokenizer cannot
            be loaded or does not fit the model; a prompt or text of the request is empty or too long for the model, or
            the model has no room for any of the default ones.
    """
    source = source or str(merged)
    config = load_config(merged).get_text_config()
    longest: int | None = getattr(config, "max_position_embeddings", None)
    if not any((merged / name).exists() for name in _TOKENIZER_FILES):
        return _draw(request, source, config.vocab_size, longest)
    parity = request.parity
    tokenizer = _load_tokenizer(merged, source)
    reader = _Reader(source, tokenizer, config.vocab_size, longest, parity.max_new_tokens)
    renderings = {prompt: reader.render(prompt) for prompt in parity.prompts}
    remarks: tuple[str, ...] = ()
    if parity.prompts == DEFAULT_PROMPTS:
        renderings = {prompt: each for prompt, each in renderings.items() if reader.has_room(each)}
        if num_left := len(DEFAULT_PROMPTS) - len(renderings):
            remarks = (
                f"{num_left} of the default prompts are left out: they leave no room in the {longest} positions.",
            )
    own = [Asked(text=p, token_ids=reader.prompt(p, renderings[p])) for p in parity.prompts if p in renderings]
    held_out = tuple(reader.held_out(text) for text in parity.texts)
    selection = select(own, functools.partial(reader.built_in, iter(PASSAGES)), parity.min_positions)
    if not selection.asked:
        raise BadInputError(
            f"{source}: max_new_tokens {parity.max_new_tokens} leave no room for a prompt in the {longest} positions "
            "of the model; lower parity.max_new_tokens, or give parity.prompts of your own"
        )
    return _prompts(selection, how_asked(tokenizer, [*renderings.values()]) + remarks, held_out, tokenizer)


@dataclass(frozen=True, slots=True)
class _Reader:
    """A tokenizer, and what its model takes."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    longest: int | None
    """Positions of the model."""
    max_new_tokens: int

    def render(self, prompt: str) -> Rendering:
        """Return a prompt as a chat, or as it is where the chat does not fit into the model's context."""
        rendering = render_chat(self.tokenizer, prompt)
        if rendering.is_chat and not self.has_room(rendering):
            refusal = f"it leaves no room in the {self.longest} positions of the model"
            return Rendering(text=prompt, is_chat=False, refusal=refusal)
        return rendering

    def has_room(self, rendering: Rendering) -> bool:
        """Whether a prompt and its continuation fit into the model's context."""
        return self._fits(self._tokenize(rendering))

    def prompt(self, prompt: str, rendering: Rendering) -> tuple[int, ...]:
        """Return the token ids of a prompt."""
        return self._check("prompts", prompt, self._tokenize(rendering), self.max_new_tokens, 1)

    def held_out(self, text: HeldOutText) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what is given of a held-out text, and what counts."""
        joined = text.prompt + text.completion
        whole = self._check("texts", joined, self._tokenize_raw(joined), 0, 2)
        given = self._tokenize_raw(text.prompt) if text.prompt else ()
        # The first token follows nothing, and has no likelihood; the last one always counts.
        num_given = min(max(num_shared(whole, given), 1), len(whole) - 1)
        return whole[:num_given], whole[num_given:]

    def built_in(self, waiting: Iterator[Sequence[str]], num_missing: int) -> Asked | None:
        """Return the next built-in prompt: with the sentences that are needed, or as many as fit into the context."""
        asked: Asked | None = None
        for passage in waiting:
            for num_sentences in range(1, len(passage) + 1):
                text = " ".join(passage[:num_sentences])
                ids = self._tokenize(self.render(text))
                if not self._fits(ids):
                    break
                asked = Asked(text=text, token_ids=self._check("prompts", text, ids, self.max_new_tokens, 1))
                if len(ids) >= num_missing:
                    break
            if asked is not None:
                break
        return asked

    def _fits(self, ids: Sequence[int]) -> bool:
        return self.longest is None or len(ids) + self.max_new_tokens <= self.longest

    def _tokenize(self, rendering: Rendering) -> tuple[int, ...]:
        if rendering.is_chat:
            return tuple(self.tokenizer(rendering.text, add_special_tokens=False)["input_ids"])
        return self._tokenize_raw(rendering.text)

    def _tokenize_raw(self, text: str) -> tuple[int, ...]:
        # What a chat template has rendered begins with the token that the tokenizer would put before it once more.
        begun = bool(self.tokenizer.bos_token) and text.startswith(str(self.tokenizer.bos_token))
        return tuple(self.tokenizer(text, add_special_tokens=not begun)["input_ids"])

    def _check(self, field: str, text: str, ids: tuple[int, ...], num_new: int, at_least: int) -> tuple[int, ...]:
        if len(ids) < at_least:
            raise BadInputError(f"parity.{field}: {text!r} has {len(ids) or 'no'} tokens, expected {at_least} or more")
        if self.longest is not None and len(ids) + num_new > self.longest:
            more = f"; with max_new_tokens {num_new} that is" if num_new else ","
            raise BadInputError(
                f"parity.{field}: {text[:40]!r}… has {len(ids)} tokens{more} more than the {self.longest} positions of "
                f"{self.source}"
            )
        if max(ids) >= self.vocab_size:
            raise BadInputError(
                f"{self.source}: the tokenizer gives token {max(ids)}, the model has {self.vocab_size}; base and "
                "tokenizer do not belong together"
            )
        return ids


def _load_tokenizer(directory: Path, source: str) -> PreTrainedTokenizerBase:
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = str(error).replace(str(directory), source)
        raise BadInputError(f"{source}: transformers cannot load its tokenizer: {reason}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _draw(request: MergeRequest, source: str, vocab_size: int, longest: int | None) -> Prompts:
    if request.parity.prompts != DEFAULT_PROMPTS or request.parity.texts:
        given = "texts" if request.parity.texts else "prompts"
        raise BadInputError(
            f"parity.{given} are given, but {source} has no tokenizer to read them with; leave them out, or add a "
            "tokenizer to the base or the adapter"
        )
    generator = torch.Generator().manual_seed(_DRAWN_SEED)

    def draw(length: int) -> Asked:
        ids = tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())
        return Asked(text=_show_ids(ids), token_ids=ids)

    def further(_: int) -> Asked | None:
        fits = longest is None or _DRAWN_FURTHER_LENGTH + request.parity.max_new_tokens <= longest
        return draw(_DRAWN_FURTHER_LENGTH) if fits else None

    own = [draw(_DRAWN_LENGTH) for _ in DEFAULT_PROMPTS]
    selection = select(own, further, request.parity.min_positions)
    return _prompts(selection, ("The prompts are random: the checkpoint has no tokenizer.",), (), None)


def _prompts(
    selection: Selection,
    remarks: tuple[str, ...],
    held_out: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Prompts:
    return Prompts(
        texts=tuple(one.text for one in selection.asked),
        token_ids=tuple(one.token_ids for one in selection.asked),
        held_out=held_out,
        tokenizer=tokenizer,
        nums_shared=selection.nums_shared,
        remarks=(*remarks, *selection.remarks),
    )


def _show_ids(token_ids: Sequence[int]) -> str:
    return "token ids " + " ".join(map(str, token_ids))
