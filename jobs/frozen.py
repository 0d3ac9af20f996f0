"""Values from the outside: immutable, and nothing in them is ignored."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""


class Frozen(BaseModel):
    """A value from the outside: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_enum_values=False, validate_default=True)


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a field holds: by itself, optionally, or as the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := inner_model(part)) is not None), None)


def is_empty(value: Any) -> bool:
    """Return whether a value is false or holds nothing: like None, it is not written where it says nothing."""
    return not value


def is_none(value: Any) -> bool:
    """Return whether a value is None: what values of an earlier version lack is not written where it says nothing."""
    return value is None
