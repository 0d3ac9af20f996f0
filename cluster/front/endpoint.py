"""What an endpoint of the API is: how it is asked, by which models, and what it answers with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from cluster.front.ledger import LedgerService

EVENT_STREAM = "text/event-stream"

FILES: Mapping[str, str] = {
    "application/json": ".json",
    "application/yaml": ".yaml",
    "application/jsonl": ".jsonl",
    "text/csv": ".csv",
}
"""Media types of request files, and the endings of their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One question, validated."""

    path: Mapping[str, str]
    query: Any
    """Of the endpoint's model."""
    body: Any
    """Of the endpoint's model; of a request file its text."""
    media_type: str
    """Of the body."""
    accept: str


@dataclass(frozen=True, slots=True)
class Written:
    """An answer that is written already."""

    content: bytes
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One thing that can be asked."""

    method: str
    path: str
    name: str
    summary: str
    call: Callable[[LedgerService, Call], Any]
    answer: Any
    """Type of what `call` returns."""
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    takes_files: bool = False
    """Whether the body may also be the text of a request file."""
    also: tuple[str, ...] = ()
    """Media types that it answers with when they are asked for, beside JSON."""
    is_open: bool = False
    """Whether it asks for no token."""


def prefers(accept: str, media_type: str) -> bool:
    """Whether an Accept header names this type before JSON and before any."""
    named = [each.partition(";")[0].strip().lower() for each in accept.split(",")]
    return next((each == media_type for each in named if each in (media_type, "application/json", "*/*")), False)
