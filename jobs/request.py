"""The merge request: what to merge, into what, how it must be proven, and where it goes. Frozen and validated."""

import hashlib
import json
import re
from collections.abc import Iterable
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jobs.combination import Combination, CombinationType, WeightedAdapter
from jobs.errors import InvalidValueError
from jobs.frozen import Frozen, is_empty, is_none
from jobs.locations import HubRepo, Location, LocationField

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?\s*", re.IGNORECASE)
_UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))} | {
    unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), start=1)
}

MERGE_KEY_VERSION = 2
"""Raised whenever the engine would write other bytes for the same request."""

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


class BaseQuantization(StrEnum):
    """What the delta is added to."""

    NONE = "none"
    """The base's own 16- or 32-bit weights."""
    NF4 = "nf4"
    """Those weights through bitsandbytes NF4 and back: what a QLoRA adapter was trained on."""
    FP4 = "fp4"
    """Those weights through bitsandbytes FP4 and back."""


def parse_size(value: Any) -> Any:
    """Turn `"2GB"` or `"500 MiB"` into bytes; leave everything else to pydantic.

    Raises:
        InvalidValueError: the text is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise InvalidValueError("a size such as 5GB or 500MiB", repr(value))
    return int(Decimal(match[1]) * _UNITS[(match[2] or "B").upper()])


NumBytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


class QuantizationOptions(Frozen):
    """How the base is quantized; the names and defaults are those of `transformers.BitsAndBytesConfig`."""

    bnb_4bit_use_double_quant: bool = False
    llm_int8_skip_modules: tuple[str, ...] | None = None
    """Modules left in 16 bits; as in transformers, an explicit list replaces the defaults (output head, tied keys)."""


class Thresholds(Frozen):
    """What a merge may differ by and still be published."""

    max_rounding_excess: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Largest |merged - exact| per element over the bound that one correct rounding allows (arithmetic check)."""
    max_mean_kl: float = Field(default=5e-3, gt=0, allow_inf_nan=False)
    """Mean KL divergence in nats, reference to merged, over all positions of prompts and continuations."""
    min_top1_agreement: float = Field(default=0.97, ge=0, le=1)
    """Share of positions with the same most likely token, among those where the reference is not near a tie."""
    max_lost_share: float = Field(default=0.05, gt=0, le=1)
    """Share of the adapter's effect that may be lost beyond what rounding takes: mean KL divergence, reference to
    merged, over that from the reference to its base without the adapter. 1 switches it off."""


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


Dtype = Literal["float32", "float16", "bfloat16"]


class MergeRequest(Frozen):
    """One base, one adapter or several that become one, one destination, and how the merge is made and proven."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    id: str = ""
    """Unique name of the job; when left out, a digest of the request, so that the same request is the same job."""
    base: LocationField
    adapters: tuple[WeightedAdapter, ...] | None = Field(default=None, min_length=1, exclude_if=is_none)
    """In the place of `adapter`: several, combined into one before they are merged."""
    combination: Combination | None = Field(default=None, exclude_if=is_none)
    """How `adapters` are combined; given exactly when they are."""
    adapter: LocationField | None = Field(default=None, exclude_if=is_none)
    destination: LocationField
    base_quantization: BaseQuantization = BaseQuantization.NF4
    quantization_options: QuantizationOptions = QuantizationOptions()
    dtype: Dtype | None = None
    """Output dtype; None keeps every base tensor's own."""
    max_shard_size: NumBytes | None = None
    """Largest output shard in bytes; None keeps the base's own shards."""
    parity: ParityPolicy = ParityPolicy()
    compare: bool = Field(default=False, exclude_if=is_empty)
    """Whether the adapter is also merged into the base in its other weights (16-bit against 4-bit), not to be
    published but for the report to say how either stands against base + adapter."""
    accept_unstable: bool = Field(default=False, exclude_if=is_empty)
    """Whether an adapter may be merged whose method gives other weights on another machine. A permission: of no effect
    on other methods, so that a file may give it to all of its requests."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Higher goes first."""
    labels: Annotated[dict[str, str], PlainSerializer(lambda labels: dict(sorted(labels.items())))] = Field(default={})

    model_config = ConfigDict(populate_by_name=True)

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str) -> str:
        if value and not _ID.fullmatch(value):
            expected = "1 to 128 letters, digits, '.', '_' or '-', a letter or digit first"
            raise InvalidValueError(expected, repr(value))
        return value

    # Checks that look at an earlier field are checks of one field too: a mistake elsewhere does not hide them.
    # What is missing is called so: where many requests share their fields, another one may fill it in.
    @field_validator("combination")
    @classmethod
    def _check_combination(cls, value: Combination | None, info: ValidationInfo) -> Combination | None:
        if "adapters" not in info.data:
            return value
        adapters = info.data["adapters"]
        if value is None and adapters is not None:
            raise PydanticCustomError("missing", "type", {"expected": "a combination with its type, for the adapters"})
        if value is not None and adapters is None:
            raise PydanticCustomError("missing", "adapters", {"expected": "adapters beside it, which it combines"})
        if value is not None and len(adapters) == 1 and value.type is not CombinationType.LINEAR:
            raise InvalidValueError("type linear, the only one for a single adapter", f"'{value.type}'")
        return value

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, value: Location | None, info: ValidationInfo) -> Location | None:
        if "adapters" in info.data:
            several = info.data["adapters"] is not None
            if value is None and not several:
                raise PydanticCustomError("missing", "adapter", {"expected": "an adapter, or adapters"})
            if value is not None and several:
                raise InvalidValueError("either an adapter or adapters", "both")
        return value

    @field_validator("destination")
    @classmethod
    def _check_destination(cls, value: Location, info: ValidationInfo) -> Location:
        places = [("base", info.data.get("base")), ("adapter", info.data.get("adapter"))]
        places += [("adapter", each.adapter) for each in info.data.get("adapters") or ()]
        for role, place in places:
            if place is not None and value.is_inside(place):
                raise InvalidValueError(f"a place outside the {role}, which is never overwritten", f"'{value}'")
        if isinstance(value, HubRepo) and "/" not in value.repo_id:
            raise InvalidValueError("a repository with its owner, hf://owner/name", f"'{value}'")
        return value

    @field_validator("quantization_options")
    @classmethod
    def _check_quantization_options(cls, value: QuantizationOptions, info: ValidationInfo) -> QuantizationOptions:
        if info.data.get("base_quantization") is BaseQuantization.NONE and value != QuantizationOptions():
            raise InvalidValueError("no options, as base_quantization 'none' would ignore them", "some")
        return value

    @field_validator("compare")
    @classmethod
    def _check_compare(cls, value: bool, info: ValidationInfo) -> bool:
        parity = info.data.get("parity")
        if value and parity is not None and parity.level == "arithmetic":
            raise InvalidValueError("false, as parity level 'arithmetic' runs no model to compare", "true")
        return value

    @model_validator(mode="after")
    def _name(self) -> Self:
        if not self.id:
            text = self.model_dump_json(by_alias=True, exclude={"id": True, "parity": self.parity.unsaid()})
            digest = hashlib.sha256(text.encode()).hexdigest()
            object.__setattr__(self, "id", f"merge-{digest[:16]}")
        return self

    @property
    def weighted(self) -> tuple[WeightedAdapter, ...]:
        """The adapters with their weights; a single one has the weight 1."""
        if self.adapters is not None:
            return self.adapters
        assert self.adapter is not None
        return (WeightedAdapter(adapter=self.adapter),)

    @property
    def adapter_name(self) -> str:
        """What people call the adapter; several are joined by hyphens."""
        return adapter_name(each.adapter for each in self.weighted)

    @property
    def adapter_words(self) -> str:
        """What people call the adapter, or what is combined and how: `ties of 1 x a, -0.5 x b`."""
        if self.combination is None:
            return self.adapter_name
        parts = ", ".join(f"{each.weight:g} x {each.adapter.name}" for each in self.weighted)
        return f"{self.combination.type} of {parts}"

    def pass_key(self) -> str:
        """Return what requests must have in common to be merged in one pass over a base."""
        options = self.quantization_options
        skip = "default" if options.llm_int8_skip_modules is None else ",".join(options.llm_int8_skip_modules)
        return (
            f"{self.base}|{self.base_quantization}|double={options.bnb_4bit_use_double_quant}"
            f"|skip={skip}|dtype={self.dtype or 'own'}"
        )

    def merge_key(self, base_digest: str, adapter_digest: str) -> str:
        """Return the digest of everything that decides the output bytes: same key, same release.

        Args:
            base_digest: identifies the base's bytes at its pinned revision.
            adapter_digest: identifies the adapter's bytes, or those of all adapters that are combined.

        Returns:
            64 hexadecimal digits.
        """
        quantized = self.base_quantization is not BaseQuantization.NONE
        decides = {
            "version": MERGE_KEY_VERSION,
            "base": base_digest,
            "adapter": adapter_digest,
            "base_quantization": self.base_quantization.value,
            "quantization_options": self.quantization_options.model_dump(mode="json") if quantized else None,
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
        }
        if self.combination is not None:
            decides["weights"] = [each.weight for each in self.weighted]
            decides["combination"] = {"type": self.combination.type.value, **self.combination.arguments()}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def adapter_name(adapters: Iterable[Location]) -> str:
    """Return one name for adapters that are combined: their names, joined by hyphens."""
    return "-".join(adapter.name for adapter in adapters)
