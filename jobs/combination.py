"""How several adapters become one: their weights, and PEFT's combination types with what each of them takes."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from jobs.errors import InvalidValueError
from jobs.frozen import Frozen
from jobs.locations import LocationField


class WeightedAdapter(Frozen):
    """One of several adapters."""

    adapter: LocationField
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What it is multiplied with; negative ones are taken away."""


class CombinationType(StrEnum):
    """`combination_type` of `add_weighted_adapter` in PEFT 0.21."""

    LINEAR = "linear"
    """Weighted sums of lora_A and of lora_B: a rough approximation of the sum of the deltas."""
    CAT = "cat"
    """lora_A and lora_B side by side: the weighted sum of the deltas, of the sum of the ranks."""
    SVD = "svd"
    """The weighted sum of the deltas, cut to a rank."""
    TIES = "ties"
    TIES_SVD = "ties_svd"
    DARE_LINEAR = "dare_linear"
    DARE_LINEAR_SVD = "dare_linear_svd"
    DARE_TIES = "dare_ties"
    DARE_TIES_SVD = "dare_ties_svd"
    MAGNITUDE_PRUNE = "magnitude_prune"
    MAGNITUDE_PRUNE_SVD = "magnitude_prune_svd"

    @property
    def decomposes(self) -> bool:
        """Whether it works on whole deltas, which it cuts to a rank at the end."""
        return self.endswith("svd")

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a combination that this type uses."""
        used = {"density"} if self not in ("linear", "cat", "svd") else set()
        if "ties" in self:
            used.add("majority_sign_method")
        if self.startswith("dare"):
            used.add("seed")
        if self.decomposes:
            used |= {"svd_rank", "svd_clamp", "svd_full_matrices"}
        return frozenset(used)


_DEFAULTS: dict[str, Any] = {
    "density": None,
    "majority_sign_method": "total",
    "svd_rank": None,
    "svd_clamp": None,
    "svd_full_matrices": True,
    "seed": 0,
}
"""PEFT's own, and the seed: what a field that is left out stands for."""


def _no_sequence(value: Any) -> Any:
    if value == "sequence":
        types = ", ".join(CombinationType)
        expected = (
            f"one of {types}; to merge one after the other, let a second request have the first's release as base"
        )
        raise InvalidValueError(expected, repr(value))
    return value


class Combination(Frozen):
    """How adapters are combined; the names and defaults are those of `add_weighted_adapter`, `seed` apart."""

    type: Annotated[CombinationType, BeforeValidator(_no_sequence)]
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the values of each adapter that is kept."""
    majority_sign_method: Literal["total", "frequency"] | None = None
    svd_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of the result; the highest of the adapters' when left out."""
    svd_clamp: Annotated[float, Field(ge=0, le=1)] | None = None
    """Quantile at which the decomposed values are cut off."""
    svd_full_matrices: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Of the random masks of the dare types."""

    @field_validator("density", "majority_sign_method", "svd_rank", "svd_clamp", "svd_full_matrices", "seed")
    @classmethod
    def _check_used(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("type")
        if kind is None:
            return value
        if value is not None and info.field_name not in kind.fields:
            raise InvalidValueError(f"no {info.field_name}, as combination type '{kind}' would ignore it", repr(value))
        if value is None and info.field_name == "density" and "density" in kind.fields:
            expected = f"a density above 0 and up to 1, which combination type '{kind}' needs"
            raise PydanticCustomError("missing", "density", {"expected": expected})
        return value

    def arguments(self) -> dict[str, Any]:
        """Return everything that this type uses, by name, defaults filled in."""
        given = {name: getattr(self, name) for name in sorted(self.type.fields)}
        return {name: _DEFAULTS[name] if value is None else value for name, value in given.items()}
