"""Prompts as a model is asked in use: through its chat template.

The template comes with the model. transformers renders it in jinja's immutable sandbox.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_REFUSALS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template raises that takes no lone question, or is none."""

_DAY = {
    "Y": "2026",
    "y": "26",
    "m": "01",
    "B": "January",
    "b": "Jan",
    "d": "01",
    "-d": "1",
    "A": "Thursday",
    "a": "Thu",
    "H": "12",
    "M": "00",
    "S": "00",
}
_FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{code}', '{value}')" for code, value in _DAY.items())
    + " }}{%- endmacro -%}"
)
"""Before templates that tell the model the day: the same prompts on every day. transformers 5.23 hands over data alone,
no functions, so it is a macro."""

_MAX_REASON = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A prompt as it is given to the tokenizer."""

    text: str
    is_chat: bool
    """Whether the template made it: nothing is to be put before it."""
    refusal: str | None = None
    """Why the template did not; None, too, for a prompt that is not for it."""


def render_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Rendering:
    """Return a prompt as a user's message, with the assistant's turn begun.

    Args:
        tokenizer: with a chat template or without.
        prompt: the message; one that holds special tokens of the tokenizer has been rendered already, and stays.
    """
    if not tokenizer.chat_template or any(token in prompt for token in _special_tokens(tokenizer)):
        return Rendering(text=prompt, is_chat=False)
    refusal = ""
    # Some templates of models that see pictures take nothing but a list of parts, and leave out other messages.
    contents: tuple[Any, ...] = (prompt, [{"type": "text", "text": prompt}])
    for content in contents:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=_FIXED_DAY + tokenizer.get_chat_template(),
                add_generation_prompt=True,
                tokenize=False,
            )
        except _REFUSALS as error:
            refusal = refusal or str(error) or type(error).__name__
        else:
            if isinstance(text, str) and prompt.strip() in text:
                return Rendering(text=text, is_chat=True)
            refusal = refusal or "the message is not in what it makes"
    printable = "".join(character if character.isprintable() else " " for character in refusal)
    return Rendering(text=prompt, is_chat=False, refusal=printable[:_MAX_REASON])


def how_asked(tokenizer: PreTrainedTokenizerBase, renderings: Sequence[Rendering]) -> tuple[str, ...]:
    """Return how prompts were asked, for the report."""
    if not tokenizer.chat_template:
        return ("The prompts were asked as they are: the tokenizer has no chat template.",)
    remarks = []
    refused = [rendering for rendering in renderings if rendering.refusal is not None]
    num_rendered = sum(not rendering.is_chat for rendering in renderings) - len(refused)
    if any(rendering.is_chat for rendering in renderings):
        remarks.append("Prompts were asked through the model's chat template.")
    if num_rendered:
        remarks.append(f"Prompts with special tokens in them, {num_rendered}, were asked as they are.")
    if refused:
        remarks.append(
            f"Prompts that the model's chat template refuses, {len(refused)}, were asked as they are: "
            f"{refused[0].refusal}"
        )
    return tuple(remarks)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in added | set(tokenizer.all_special_tokens) if token}
