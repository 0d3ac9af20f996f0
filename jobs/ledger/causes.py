"""Failures by cause: messages that differ in names and numbers alone are one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jobs.errors import FailureClass

_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|(?:s3|hf|file)://\S+|/[^\s:;,]+|\b[0-9a-f]{12,}\b|\d+(?:\.\d+)?")
"""What differs between failures of one cause: quoted names, places, digests, numbers."""
_MAX_IDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureGroup:
    """Jobs that failed for one cause."""

    failure_class: FailureClass
    num_jobs: int
    message: str
    """Of the first of them."""
    ids: tuple[str, ...]
    """Of the first few."""


def group_failures(failures: Iterable[tuple[str, FailureClass, str]]) -> tuple[FailureGroup, ...]:
    """Return failures by cause, the most frequent first.

    Args:
        failures: id, class and message of each job.
    """
    groups: dict[tuple[FailureClass, str], list[tuple[str, str]]] = {}
    for job_id, failure_class, message in failures:
        cause = re.sub(rf"(?<![\w-]){re.escape(job_id)}(?![\w-])", "…", _NAMES.sub("…", message))
        groups.setdefault((failure_class, cause), []).append((job_id, message))
    found = [
        FailureGroup(
            failure_class=failure_class,
            num_jobs=len(members),
            message=members[0][1],
            ids=tuple(job_id for job_id, _ in members[:_MAX_IDS]),
        )
        for (failure_class, _), members in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: -group.num_jobs))
