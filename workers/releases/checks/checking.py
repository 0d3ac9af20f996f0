"""All rules held against one checkpoint, in an order in which one fault is told once.

What cannot be known because of a fault is not guessed: tensors are held against the model only where files, index,
names and codes are in order.
"""

from collections.abc import Mapping
from pathlib import Path

from jobs.errors import MergefleetError
from workers.files.layout import CheckpointLayout
from workers.releases.checks import (
    bedrock,
    configuration,
    dtypes,
    files,
    generation,
    gguf_files,
    index,
    names,
    quantization,
    templates,
    tensors,
    vocabularies,
)
from workers.releases.checks.checkpoint import read_leniently
from workers.releases.checks.rules import Finding, Rule, Severity
from workers.releases.checks.skeletons import Skeleton, build_skeleton

RULES: Mapping[str, Rule] = {
    rule.id: rule
    for topic in (
        files,
        index,
        names,
        tensors,
        quantization,
        dtypes,
        gguf_files,
        vocabularies,
        templates,
        generation,
        configuration,
        bedrock,
    )
    for rule in topic.RULES
}
"""Every rule, by its id."""
_RANKS = (Severity.ERROR, Severity.WARNING, Severity.NOTE)


def check_checkpoint(directory: Path, layout: CheckpointLayout | None = None) -> tuple[Finding, ...]:
    """Hold every rule against a checkpoint. No weight is read.

    Args:
        directory: of it; shards may be of the right size with nothing in them but their headers.
        layout: its shards, where they are known and need not lie there (any more).

    Returns:
        What was found, errors first.

    Raises:
        NotFoundError: there is no such directory.
        AuthError, TransientIOError: it cannot be read, by kind of fault.
    """
    checkpoint = read_leniently(directory, layout)
    found = [*files.find(checkpoint), *index.find(checkpoint)]
    found += gguf_files.find(checkpoint)
    whole = not _errors(found)
    built = build_skeleton(checkpoint) if whole else None
    skeleton = built if isinstance(built, Skeleton) else None
    of_dtypes = list(dtypes.find(checkpoint)) if whole else []
    problem = built if isinstance(built, MergefleetError) and not _errors(of_dtypes) else None
    of_config = list(configuration.find(checkpoint, problem))
    if whole:
        own = () if skeleton is None else skeleton.state.keys()
        of_weights = list(names.find(checkpoint, skeleton)) or list(quantization.find(checkpoint, own))
        if skeleton is not None and not of_weights and not _errors(of_config):
            of_weights = list(tensors.find(skeleton))
        found += of_weights + of_dtypes
    found += vocabularies.find(checkpoint, skeleton)
    found += templates.find(checkpoint)
    found += generation.find(checkpoint)
    found += of_config
    found += bedrock.find(checkpoint)
    return tuple(sorted(found, key=lambda each: _RANKS.index(each.severity)))


def _errors(findings: list[Finding]) -> bool:
    return any(each.severity is Severity.ERROR for each in findings)
