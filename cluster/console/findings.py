"""What the check of a checkpoint found, for a person and for a program."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from jobs.locations import Location
from jobs.text import MAX_MESSAGE, shown
from workers.releases.checks.rules import Finding, Severity

_STYLES = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def findings_document(location: Location, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return what was found, worst first."""
    return {
        "location": str(location),
        **{f"num_{severity}s": _count(findings, severity) for severity in Severity},
        "findings": [
            {
                "rule": each.rule.id,
                "severity": each.severity.value,
                "what": each.rule.what,
                "file": each.file,
                "where": each.where,
                "found": each.found,
                "expected": each.expected,
                "refused_by": [engine.value for engine in each.rule.refused_by],
                "misread_by": [engine.value for engine in each.rule.misread_by],
                "advice": each.rule.advice,
                "source": each.rule.source,
            }
            for each in findings
        ],
    }


def findings_view(location: Location, findings: Sequence[Finding]) -> Text:
    """Return a paragraph for each finding, and one line that counts them."""
    counts = ", ".join(f"{_count(findings, severity)} {severity}s" for severity in Severity)
    return Text("\n").join([*map(_paragraph, findings), Text(shown(f"{location}: {counts}", MAX_MESSAGE))])


def _paragraph(each: Finding) -> Text:
    place = f"{each.file}: {each.where}" if each.where else each.file
    lines = [
        f"{each.severity}  {each.rule.id}  {place}",
        f"    {each.rule.what}: expected {each.expected}, found {each.found}",
        *([f"    {who}"] if (who := _who(each)) else []),
        f"    {each.rule.advice}",
    ]
    return Text("\n").join([Text(shown(line, MAX_MESSAGE), _STYLES[each.severity]) for line in lines])


def _who(each: Finding) -> str:
    refused, misread = (", ".join(engines) for engines in (each.rule.refused_by, each.rule.misread_by))
    told = [f"refused by {refused}" if refused else "", f"misread by {misread}" if misread else ""]
    return "; ".join(part for part in told if part)


def _count(findings: Sequence[Finding], severity: Severity) -> int:
    return sum(each.severity is severity for each in findings)
