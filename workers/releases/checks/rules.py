"""What a rule is, and what was found against one."""

import dataclasses
import enum
from dataclasses import dataclass


class Engine(enum.StrEnum):
    """What loads a checkpoint."""

    TRANSFORMERS_5 = "transformers-5"
    TRANSFORMERS_4 = "transformers-4"
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"
    """Its converter, `convert_hf_to_gguf.py`."""
    BEDROCK = "bedrock"
    """Custom model import of Amazon Bedrock."""


class Severity(enum.StrEnum):
    """How much a finding matters where no engine is named."""

    ERROR = "error"
    """The checkpoint is not whole, or contradicts itself: engines refuse it, or load another model."""
    WARNING = "warning"
    """One of them refuses it, or reads it otherwise than it is meant."""
    NOTE = "note"
    """It depends on the engine, its version, or what the checkpoint is for."""


EVERY = tuple(Engine)
TRANSFORMERS = (Engine.TRANSFORMERS_5, Engine.TRANSFORMERS_4)
SERVERS = (Engine.VLLM, Engine.SGLANG)
_RANKS = (Severity.NOTE, Severity.WARNING, Severity.ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One way in which a checkpoint can be wrong."""

    id: str
    """Topic and name, stable: scripts go by it."""
    what: str
    """Is wrong, in a few words."""
    severity: Severity
    refused_by: tuple[Engine, ...] = ()
    """Do not load it."""
    misread_by: tuple[Engine, ...] = ()
    """Load it, and compute or answer otherwise than it is meant."""
    advice: str
    """What to do."""
    source: str
    """Where that was seen: a file and symbol of a library, or a public thread."""

    def severity_for(self, engine: Engine) -> Severity | None:
        """Return how much it matters to those who deploy with one engine; None where that engine does not mind.

        A rule that names no engine at all holds for every one.
        """
        if engine in self.refused_by:
            return Severity.ERROR
        if engine in self.misread_by:
            return max(self.severity, Severity.WARNING, key=_RANKS.index)
        return None if self.refused_by or self.misread_by else self.severity


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found against a rule."""

    rule: Rule
    file: str
    """Name in the checkpoint."""
    where: str = ""
    """Tensor or field; empty where the file as a whole is meant."""
    found: str
    expected: str
    severity: Severity

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        place = f"{self.file}: {self.where}" if self.where else self.file
        return f"{place}: {self.rule.what}: expected {self.expected}, found {self.found}; {self.rule.advice}"


def finding(rule: Rule, file: str, where: str = "", *, found: str, expected: str) -> Finding:
    """Return a finding as severe as its rule."""
    return Finding(rule=rule, file=file, where=where, found=found, expected=expected, severity=rule.severity)


def for_engine(findings: tuple[Finding, ...], engine: Engine) -> tuple[Finding, ...]:
    """Return those findings that matter to one engine, as much as they do there."""
    severities = [(each, each.rule.severity_for(engine)) for each in findings]
    return tuple(dataclasses.replace(each, severity=severity) for each, severity in severities if severity is not None)


def several(names: list[str]) -> str:
    """Return the first of some names, and how many there are beside it."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
