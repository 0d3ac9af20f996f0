"""Whether a release agrees with itself: its manifest with its parity report and its index."""

import math
from collections.abc import Iterator

from pydantic import ValidationError
from pydantic_core import from_json

from jobs.parity_report import BehaviourCheck, ParityReport, ParitySummary
from jobs.release import MANIFEST_NAME, REPORT_NAME, Manifest
from jobs.request_files.problems import show
from workers.files.layout import INDEX_FILE
from workers.releases.released import repeated_field, what_is_wrong

_MAX_SHOWN = 80
_SAID_TWICE = sorted((Manifest.model_fields.keys() & ParityReport.model_fields.keys()) - {"schema_version"})


def disagreements(manifest: Manifest, report: bytes) -> list[str]:
    """Compare a manifest with the parity report it names.

    Args:
        manifest: of a release.
        report: the bytes of its `parity.json`.

    Returns:
        One sentence for each thing that the two say differently, or that the report says against the release.
    """
    try:
        found = ParityReport.model_validate_json(report)
    except ValidationError as error:
        return [what_is_wrong(error, ParityReport, f"{REPORT_NAME}:", "no parity report of mergefleet")]
    if field := repeated_field(report):
        return [f"{REPORT_NAME}: names the field {show(field)} twice"]
    told = {name: getattr(found, name) for name in _SAID_TWICE}
    named = {name: getattr(manifest, name) for name in _SAID_TWICE}
    figures = _figures(found)
    told |= figures
    named |= {name: getattr(manifest.parity, name) for name in figures}
    wrong = [
        f"{REPORT_NAME}: {name} is {_shown(value)}, {MANIFEST_NAME} says {_shown(named[name])}"
        for name, value in told.items()
        if value != named[name]
    ]
    if not found.passed:
        wrong.append(f"{REPORT_NAME}: says that parity did not pass")
    return [*wrong, *_contradictions(found)]


def _contradictions(report: ParityReport) -> Iterator[str]:
    """Yield a sentence for each thing that a report holds and that no report of a parity that passed does."""
    if report.failures:
        yield f"{REPORT_NAME}: names a failure: {show(report.failures[0])}"
    for check in report.tensors:
        if check.num_bad_elements:
            yield f"{REPORT_NAME}: {show(check.tensor)} has {check.num_bad_elements} elements above the bound"
        if not (math.isfinite(check.max_abs_error) and math.isfinite(check.rounding_excess)):
            yield f"{REPORT_NAME}: {show(check.tensor)} has an error that is no number"


def missing_parts(manifest: Manifest) -> list[str]:
    """Return a sentence for each file that every release has and a manifest does not name."""
    names = {artifact.path for artifact in manifest.files}
    lacks = [name for name in ("config.json", REPORT_NAME) if name not in names]
    in_gguf = manifest.output is not None and manifest.output.is_gguf
    kind = ".gguf" if in_gguf else ".safetensors"
    if not any(name.endswith(kind) for name in names):
        lacks.append(f"*{kind}")
    return [f"{name}: not in the manifest, and every release has it" for name in lacks]


def missing_shards(manifest: Manifest, index: bytes) -> list[str]:
    """Return a sentence for each shard that an index names and a manifest does not.

    Args:
        manifest: of a release.
        index: the bytes of its `model.safetensors.index.json`.
    """
    try:
        shards = {str(shard) for shard in from_json(index)["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return [f"{INDEX_FILE}: is no index of safetensors files"]
    names = {artifact.path for artifact in manifest.files}
    return [f"{INDEX_FILE}: names {show(shard)}, {MANIFEST_NAME} does not" for shard in sorted(shards - names)]


def _figures(report: ParityReport) -> dict[str, object]:
    """Return what a report comes to, by the names that a manifest has for it."""
    survivals = [check.survival for check in report.tensors if check.survival is not None]
    gating = next((check for check in report.behaviour if check.gates), None)
    shared = ParitySummary.model_fields.keys() & BehaviourCheck.model_fields.keys()
    return {
        "level": report.level,
        "num_tensors": len(report.tensors),
        "num_changed_tensors": sum(check.changed for check in report.tensors),
        "rounding_excess": max((check.rounding_excess for check in report.tensors), default=0.0),
        "min_survival": min(survivals, default=None),
        **{name: getattr(gating, name) if gating else None for name in sorted(shared)},
    }


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
