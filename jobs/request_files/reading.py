"""Bulk request files: YAML, JSON lines or CSV become merge requests, or every mistake in them at once.

YAML has `requests:`, a list; `defaults:`, laid under every request; and `matrix:`, one or a list, which multiplies
`bases`, `adapters` and `quantizations`; a pattern among `adapters` stands for the folders that match it and hold an
adapter. JSON lines hold one request a line, CSV one a row. A request with `outputs` stands for one for each of these
forms. In every format `id` and `destination` may hold `{base}`, `{adapter}`, `{step}` and `{quantization}`,
`destination` also `{id}`, and in a matrix labels may as well; `{{` is a brace. Relative paths are taken from the
directory of the file. A field that is null or empty takes its built-in default.
"""

import contextlib
import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel

from jobs.allowance import Allowance
from jobs.frozen import inner_model
from jobs.locations import Elsewhere
from jobs.request import MergeRequest
from jobs.request_files.documents import DocumentTooLargeError, joined, read_csv, read_json, read_jsonl
from jobs.request_files.drafts import DraftCheck
from jobs.request_files.matrix import MAX_REQUESTS, Expansion, expand
from jobs.request_files.patterns import Listing, is_pattern
from jobs.request_files.problems import Problem, ProblemList, RequestFileError, show
from jobs.request_files.siblings import FIELD, siblings, without_outputs
from jobs.request_files.sweeps import Sweeps
from jobs.request_files.yaml_tree import read_yaml

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_REQUESTS",
    "Origin",
    "Problem",
    "Reading",
    "RequestFileError",
    "document_of",
    "has_patterns",
    "load_requests",
    "parse_requests",
    "read_requests",
    "read_text",
]

MAX_FILE_BYTES = 16 * 1024**2
MAX_PROBLEMS = 1_000
"""More are of no use to a person, and each takes time to find and to show."""
_EVERYWHERE = Allowance()
_SUFFIXES = (".yaml", ".yml", ".jsonl", ".csv")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the text of requests comes from."""

    name: str
    """What messages call it."""
    suffix: str
    """Says what it is: `.yaml`, `.yml`, `.jsonl` or `.csv`; `.json` for a JSON document as YAML would have it."""
    directory: Path | Elsewhere
    """What relative paths are taken from."""

    @classmethod
    def of(cls, path: Path) -> "Origin":
        """Return what a file of this machine is."""
        return cls(str(path), path.suffix.lower(), path.absolute().parent)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file says."""

    requests: tuple[MergeRequest, ...]
    """At least one; ids and destinations are unique within the file, and no destination lies inside another."""
    left_out: tuple[str, ...] = ()
    """Folders that match a pattern and hold no whole adapter yet, each with the reason."""


def load_requests(path: Path, allowance: Allowance = _EVERYWHERE) -> tuple[MergeRequest, ...]:
    """Read a request file without patterns; returns and raises as `read_requests` does.

    Args:
        path: the file; its suffix says what it is: `.yaml`, `.yml`, `.jsonl` or `.csv`.
        allowance: the places that requests may name.
    """
    return read_requests(read_text(path), Origin.of(path), allowance).requests


def parse_requests(text: str, origin: Origin, allowance: Allowance = _EVERYWHERE) -> tuple[MergeRequest, ...]:
    """Read the text of requests without patterns; returns and raises as `read_requests` does."""
    return read_requests(text, origin, allowance).requests


def read_requests(
    text: str, origin: Origin, allowance: Allowance = _EVERYWHERE, listing: Listing | None = None
) -> Reading:
    """Read the text of requests.

    Args:
        text: of a request file.
        origin: where it comes from.
        allowance: the places that requests may name.
        listing: what patterns are looked up in; without one they are mistakes.

    Raises:
        RequestFileError: anything is wrong; lists every mistake with its line.
        TransientIOError: a pattern could not be looked up, as a store did not answer.
    """
    problems = ProblemList(origin.name)
    sweeps = Sweeps(listing, origin.directory, allowance, problems)
    expansion = Expansion()
    try:
        expansion = _expansion(origin.suffix, text, problems, sweeps)
    except DocumentTooLargeError as error:
        problems.add(None, "", str(error), "more")
    nodes = [
        (sibling, is_multiplied)
        for is_multiplied, given in enumerate((expansion.requests, expansion.multiplied))
        for node in given
        for sibling in siblings(node, problems)
    ]
    if len(nodes) > MAX_REQUESTS:
        problems.add(None, "", f"at most {MAX_REQUESTS} requests in one file", str(len(nodes)))
        nodes = []
    check = DraftCheck(
        origin.directory, problems, strict=origin.suffix != ".csv", allowance=allowance, steps=sweeps.steps
    )
    for node in expansion.shared:
        check.shared(without_outputs(node))
    requests = list[MergeRequest | None]()
    for number, (node, is_multiplied) in enumerate(nodes):
        if len(problems) > MAX_PROBLEMS:
            rest = len(nodes) - number
            problems.add(
                None, "", f"at most {MAX_PROBLEMS} mistakes", f"more; the last {rest} requests were not looked at"
            )
            break
        requests.append(check.request(node, has_templates_in_labels=bool(is_multiplied)))
    if not requests and not problems:
        problems.add(None, "", "at least one request", "none")
    if problems:
        raise problems.error(lines=origin.suffix != ".json")
    return Reading(tuple(request for request in requests if request is not None), tuple(sweeps.left_out))


def has_patterns(text: str, origin: Origin) -> bool:
    """Whether the text of requests has patterns among the adapters of a matrix; nothing is looked up."""
    if not is_pattern(text):
        return False
    problems = ProblemList(origin.name)
    sweeps = Sweeps(None, origin.directory, _EVERYWHERE, problems)
    with contextlib.suppress(DocumentTooLargeError):
        _expansion(origin.suffix, text, problems, sweeps)
    return sweeps.num_patterns > 0


def document_of(requests: Sequence[MergeRequest]) -> str:
    """Return requests as a JSON document that `parse_requests` reads as they are."""
    fields = [request.model_dump(mode="json", by_alias=True) for request in requests]
    for each in fields:
        each["destination"] = each["destination"].replace("{", "{{").replace("}", "}}")  # no templates
    return json.dumps({"requests": fields})


def read_text(path: Path) -> str:
    """Return the text of a request file.

    Raises:
        RequestFileError: it cannot be read, is too large, or is no request file by its name.
    """
    problems = ProblemList(str(path))
    content = _read_bytes(path, problems)
    text = None if content is None else decoded(content, problems)
    if text is None:
        raise problems.error()
    return text


def decoded(content: bytes, problems: ProblemList) -> str | None:
    """Return bytes as text, or None when they are none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problems.add(line, "", "text in UTF-8", f"the byte 0x{content[error.start]:02x}")
        return None


def _read_bytes(path: Path, problems: ProblemList) -> bytes | None:
    if path.suffix.lower() not in _SUFFIXES:
        problems.add(None, "", f"a file name that ends in {', '.join(_SUFFIXES)}", show(path.name))
        return None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            problems.add(None, "", "a regular file", "something else")
            return None
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        problems.add(None, "", "a readable file", error.strerror or str(error))
        return None
    if len(content) > MAX_FILE_BYTES:
        problems.add(None, "", f"at most {MAX_FILE_BYTES} bytes", "more")
        return None
    return content


def _expansion(suffix: str, text: str, problems: ProblemList, sweeps: Sweeps) -> Expansion:
    if suffix == ".jsonl":
        return Expansion(requests=list(read_jsonl(text, problems)))
    if suffix == ".csv":
        return Expansion(requests=list(read_csv(text, _columns(MergeRequest) | {FIELD: True}, problems)))
    root = read_json(text, problems) if suffix == ".json" else read_yaml(text, problems)
    return Expansion() if root is None else expand(root, problems, sweeps)


def _columns(model: type[BaseModel], parent: str = "") -> dict[str, bool]:
    """Return the CSV columns of a model, and whether their cells are lists. `schema` speaks of a file, not of a row."""
    columns: dict[str, bool] = {}
    for name, info in model.model_fields.items():
        column = joined(parent, name)
        kind = info.annotation
        is_list = any(get_origin(part) is tuple for part in (kind, *get_args(kind)))
        inner = inner_model(kind)
        if inner is not None and not is_list:
            columns |= _columns(inner, column)
        elif get_origin(kind) is dict:
            columns[f"{column}.*"] = False
        elif info.alias is None:
            columns[column] = is_list
    return columns
