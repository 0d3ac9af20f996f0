"""Bulk request files: YAML, JSON lines or CSV become merge requests, or every mistake in them at once.

YAML has `requests:`, a list; `defaults:`, laid under every request; and `matrix:`, one or a list, which multiplies
`bases`, `adapters` and `quantizations`. JSON lines hold one request a line, CSV one a row. In every format `id` and
`destination` may hold `{base}`, `{adapter}` and `{quantization}`, `destination` also `{id}`; `{{` is a brace. Relative
paths are taken from the directory of the file. A field that is null or empty takes its built-in default.
"""

import stat
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel

from jobs.allowance import Allowance
from jobs.frozen import inner_model
from jobs.request import MergeRequest
from jobs.request_files.documents import DocumentTooLargeError, joined, read_csv, read_jsonl
from jobs.request_files.drafts import DraftCheck
from jobs.request_files.matrix import MAX_REQUESTS, Expansion, expand
from jobs.request_files.problems import Problem, ProblemList, RequestFileError, show
from jobs.request_files.yaml_tree import read_yaml

__all__ = ["MAX_FILE_BYTES", "MAX_REQUESTS", "Problem", "RequestFileError", "load_requests"]

MAX_FILE_BYTES = 16 * 1024**2
MAX_PROBLEMS = 1_000
"""More are of no use to a person, and each takes time to find and to show."""
_EVERYWHERE = Allowance()
_SUFFIXES = (".yaml", ".yml", ".jsonl", ".csv")


def load_requests(path: Path, allowance: Allowance = _EVERYWHERE) -> tuple[MergeRequest, ...]:
    """Read a request file.

    Args:
        path: the file; its suffix says what it is: `.yaml`, `.yml`, `.jsonl` or `.csv`.
        allowance: the places that requests may name.

    Returns:
        At least one request; ids and destinations are unique within the file, and no destination lies inside another.

    Raises:
        RequestFileError: anything is wrong; lists every mistake with its line.
    """
    problems = ProblemList(path)
    expansion = Expansion()
    text = _read_text(path, problems)
    suffix = path.suffix.lower()
    try:
        if text is not None:
            expansion = _expansion(suffix, text, problems)
    except DocumentTooLargeError as error:
        problems.add(None, "", str(error), "more")
    if len(expansion.requests) > MAX_REQUESTS:
        problems.add(None, "", f"at most {MAX_REQUESTS} requests in one file", str(len(expansion.requests)))
        expansion = Expansion()
    check = DraftCheck(path.absolute().parent, problems, strict=suffix != ".csv", allowance=allowance)
    for node in expansion.shared:
        check.shared(node)
    requests = list[MergeRequest | None]()
    for number, node in enumerate(expansion.requests):
        if len(problems) > MAX_PROBLEMS:
            rest = len(expansion.requests) - number
            problems.add(
                None, "", f"at most {MAX_PROBLEMS} mistakes", f"more; the last {rest} requests were not looked at"
            )
            break
        requests.append(check.request(node))
    if not requests and not problems:
        problems.add(None, "", "at least one request", "none")
    if problems:
        raise problems.error()
    return tuple(request for request in requests if request is not None)


def _read_text(path: Path, problems: ProblemList) -> str | None:
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
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problems.add(line, "", "text in UTF-8", f"the byte 0x{content[error.start]:02x}")
        return None


def _expansion(suffix: str, text: str, problems: ProblemList) -> Expansion:
    if suffix == ".jsonl":
        return Expansion(requests=list(read_jsonl(text, problems)))
    if suffix == ".csv":
        return Expansion(requests=list(read_csv(text, _columns(MergeRequest), problems)))
    root = read_yaml(text, problems)
    return Expansion() if root is None else expand(root, problems)


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
