"""The merge request: what to merge, into what, how it must be proven, and where it goes. Frozen and validated."""

import hashlib
import json
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
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
from jobs.kept import Keep, check_keep
from jobs.locations import HubRepo, Location, LocationField
from jobs.output_form import OutputForm
from jobs.parity_policy import ParityPolicy
from jobs.sizes import NumBytes

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MERGE_KEY_VERSION = 2
"""Raised whenever the engine would write other bytes for the same request."""


class BaseQuantization(StrEnum):
    """What the delta is added to."""

    DEFAULT = "default"
    """What is usual for the base: its own weights where they are stored in a form, and NF4 of those in 16 bits."""
    NONE = "none"
    """The base's own 16- or 32-bit weights."""
    NF4 = "nf4"
    """Those weights through bitsandbytes NF4 and back: what a QLoRA adapter was trained on."""
    FP4 = "fp4"
    """Those weights through bitsandbytes FP4 and back."""
    STORED = "stored"
    """The base's own weights as they are stored; in FP8 or 4 bits, what their codes stand for."""

    @property
    def converts(self) -> bool:
        """Whether plain weights go through 4 bits."""
        return self in (BaseQuantization.NF4, BaseQuantization.FP4)


class QuantizationOptions(Frozen):
    """How the base is quantized; the names and defaults are those of `transformers.BitsAndBytesConfig`."""

    bnb_4bit_use_double_quant: bool = False
    llm_int8_skip_modules: tuple[str, ...] | None = None
    """Modules left in 16 bits; as in transformers, an explicit list replaces the defaults (output head, tied keys)."""


Dtype = Literal["float32", "float16", "bfloat16"]


def _is_plain(value: Any) -> bool:
    return value is OutputForm.PLAIN


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
    base_quantization: BaseQuantization = BaseQuantization.DEFAULT
    quantization_options: QuantizationOptions = QuantizationOptions()
    dtype: Dtype | None = None
    """Output dtype; None keeps every base tensor's own."""
    output: OutputForm = Field(default=OutputForm.PLAIN, exclude_if=_is_plain)
    """What the weights of the release are stored in."""
    keep: Keep | None = Field(default=None, exclude_if=is_none)
    """What weights are kept in that would lose more of the adapter's delta in that form than `min_survival` allows;
    None fails the job."""
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
    deadline: AwareDatetime | None = Field(default=None, exclude_if=is_none)
    """When it is too late to begin: a job that still waits then fails."""
    timeout_seconds: Annotated[float, Field(gt=0)] | None = Field(default=None, exclude_if=is_none)
    """How long one attempt may take before it is stopped, and has failed."""
    requires_approval: bool = Field(default=False, exclude_if=is_empty)
    """Whether a person has to approve the merged and proven release before it is published."""
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
        if isinstance(value, HubRepo) and value.path:
            expected = "a whole repository, hf://owner/name: a release is all of its repository, not a folder in one"
            raise InvalidValueError(expected, f"'{value}'")
        return value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: dict[str, str]) -> dict[str, str]:
        if broken := next((text for pair in value.items() for text in pair if "\0" in text), None):
            raise InvalidValueError("labels without the character NUL, which no database keeps", repr(broken))
        return value

    @field_validator("quantization_options")
    @classmethod
    def _check_quantization_options(cls, value: QuantizationOptions, info: ValidationInfo) -> QuantizationOptions:
        found = info.data.get("base_quantization")
        if found in (BaseQuantization.NONE, BaseQuantization.STORED) and value != QuantizationOptions():
            raise InvalidValueError(f"no options, as base_quantization '{found}' would ignore them", "some")
        return value

    # Beside those of plain numbers: a release as its base is has the base's dtypes and files.
    @field_validator("output")
    @classmethod
    def _check_output(cls, value: OutputForm, info: ValidationInfo) -> OutputForm:
        if value is OutputForm.AS_BASE and info.data.get("dtype") is not None:
            raise InvalidValueError("no dtype beside as_base, which keeps the base's own", f"'{info.data['dtype']}'")
        return value

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, value: Keep | None, info: ValidationInfo) -> Keep | None:
        check_keep(value, info.data.get("output"))
        return value

    @field_validator("max_shard_size")
    @classmethod
    def _check_max_shard_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        output = info.data.get("output")
        if value is not None and output is OutputForm.AS_BASE:
            raise InvalidValueError("none beside output 'as_base', which keeps the base's own shards", f"{value}")
        if value is not None and output is not None and output.is_gguf:
            raise InvalidValueError(f"none beside output '{output}', which is one file", f"{value}")
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
            # As the first version named it, which had no other default.
            said = self.settled(BaseQuantization.NF4)
            text = said.model_dump_json(by_alias=True, exclude={"id": True, "parity": self.parity.unsaid()})
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

    def settled(self, usual: BaseQuantization) -> Self:
        """Return this request as it is once its base is known.

        Args:
            usual: what its delta is added to where it leaves that to the base.
        """
        if self.base_quantization is not BaseQuantization.DEFAULT:
            return self
        return self.model_copy(update={"base_quantization": usual})

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
        assert self.base_quantization is not BaseQuantization.DEFAULT, "what that stands for depends on the base"
        quantized = self.base_quantization.converts
        decides = {
            "version": MERGE_KEY_VERSION,
            "base": base_digest,
            "adapter": adapter_digest,
            "base_quantization": self.base_quantization.value,
            "quantization_options": self.quantization_options.model_dump(mode="json") if quantized else None,
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
        }
        if self.output is not OutputForm.PLAIN:
            decides["output"] = self.output.value
        if self.keep is not None:
            decides["keep"] = {"in": self.keep.value, "min_survival": self.parity.least_survival}
        if self.combination is not None:
            decides["weights"] = [each.weight for each in self.weighted]
            decides["combination"] = {"type": self.combination.type.value, **self.combination.arguments()}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def adapter_name(adapters: Iterable[Location]) -> str:
    """Return one name for adapters that are combined: their names, joined by hyphens."""
    return "-".join(adapter.name for adapter in adapters)
