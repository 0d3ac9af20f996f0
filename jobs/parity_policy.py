"""How a merge must be proven: the parity policy of a request."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from jobs.errors import InvalidValueError
from jobs.frozen import Frozen, is_empty, is_none

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Question: What is 12 times 7?\nAnswer:",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Translate to French: Good morning, how are you?",
    "List three uses of a paperclip:\n1.",
    "The patient was admitted with a fever and",
    "In 1969, the first humans",
)


class Thresholds(Frozen):
    """What a merge may differ by and still be published."""

    max_rounding_excess: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Largest `|merged - exact|` per element over the bound that one correct rounding allows (arithmetic check)."""
    max_mean_kl: float = Field(default=5e-3, gt=0, allow_inf_nan=False)
    """Mean KL divergence in nats, reference to merged, over all positions of prompts and continuations."""
    min_top1_agreement: float = Field(default=0.97, ge=0, le=1)
    """Share of positions with the same most likely token, among those where the reference is not near a tie."""
    max_lost_share: float = Field(default=0.05, gt=0, le=1)
    """Share of the adapter's effect that may be lost beyond what rounding takes: mean KL divergence, reference to
    merged, over that from the reference to its base without the adapter. 1 switches it off."""
    min_survival: float | None = Field(default=None, ge=0, le=1, exclude_if=is_none)
    """Smallest share of a tensor's delta that is to survive; None asks for half of it in weights that are quantized
    again, and for nothing of those that are only rounded."""


MIN_REQUANTIZED_SURVIVAL = 0.5


class HeldOutText(Frozen):
    """A text that the adapter was not trained on, as the model reads it: of a chat, with its template's marks."""

    prompt: str = ""
    """What is given, and does not count."""
    completion: str = Field(min_length=1)
    """What counts."""


def _as_completion(value: object) -> object:
    return {"completion": value} if isinstance(value, str) else value


class ParityPolicy(Frozen):
    """How a merge must be proven before it is published. Parity always gates publishing."""

    level: Literal["full", "arithmetic"] = "full"
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=DEFAULT_PROMPTS, min_length=1)
    """Asked through the model's chat template, where it has one; a prompt with the model's special tokens in it is
    taken as rendered already."""
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] = 16
    """Length of the greedy continuation shown in the report."""
    min_positions: Annotated[int, Field(ge=1, le=4096)] = 256
    """Positions to compare at least: where the prompts have fewer, built-in ones are asked, too."""
    texts: tuple[Annotated[HeldOutText, BeforeValidator(_as_completion)], ...] = Field(default=(), exclude_if=is_empty)
    """Held-out texts whose likelihood is measured; a mere string is a completion of nothing."""
    thresholds: Thresholds = Thresholds()

    @property
    def least_survival(self) -> float:
        """Smallest share of a delta that is to survive in a weight that is quantized."""
        asked = self.thresholds.min_survival
        return MIN_REQUANTIZED_SURVIVAL if asked is None else asked

    def unsaid(self) -> dict[str, Any]:
        """Return the fields of later versions that say nothing new: they do not decide the name of a request."""
        fields: dict[str, Any] = {}
        if self.min_positions == type(self).model_fields["min_positions"].default:
            fields["min_positions"] = True
        if self.thresholds.max_lost_share == Thresholds().max_lost_share:
            fields["thresholds"] = {"max_lost_share"}
        return fields

    @field_validator("texts")
    @classmethod
    def _check_texts(cls, value: tuple[HeldOutText, ...], info: ValidationInfo) -> tuple[HeldOutText, ...]:
        if value and info.data.get("level") == "arithmetic":
            raise InvalidValueError("no texts, as level 'arithmetic' runs no model", "some")
        return value
