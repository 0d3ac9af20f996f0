"""What deployment sees: the files of a release, its manifest, and the parity report that let it out."""

import unicodedata
from typing import Annotated, Literal

from pydantic import Field, field_validator

from jobs.combination import Combination
from jobs.errors import InvalidValueError
from jobs.frozen import Frozen, Sha256, is_empty, is_none
from jobs.kept import KeptWeights
from jobs.locations import LocationField
from jobs.output_form import OutputForm
from jobs.parity_report import CombinedAdapter, ParitySummary
from jobs.request import BaseQuantization, Dtype, QuantizationOptions

MANIFEST_NAME = "manifest.json"
REPORT_NAME = "parity.json"
REPORT_PAGE_NAME = "parity.html"
_MAX_NAME_BYTES = 255
"""Of one part of a path: what file systems take."""
_NOWHERE_PLAIN = frozenset('\\:*?"<>|')
"""Separators, wildcards and streams of some system or other."""


def is_plain_path(value: str) -> bool:
    """Return whether a path may be one of a release: relative, and a plain name on every store and file system.

    Its parts are printable, in any script, and may hold spaces; none is hidden, climbs (`..`), looks like an option, or
    ends in what some system drops.
    """
    return all(
        0 < len(part.encode(errors="replace")) <= _MAX_NAME_BYTES
        and part.isprintable()
        and part[0] not in " .-~"
        and part[-1] not in " ."
        and not _NOWHERE_PLAIN.intersection(part)
        for part in value.split("/")
    )


def one_name(path: str) -> str:
    """Return what all names of one file have in common, on systems that take case and forms of a letter as one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class Artifact(Frozen):
    """One file of a release."""

    path: str
    """Relative to the release, with forward slashes."""
    num_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _check_path(cls, value: str) -> str:
        if not is_plain_path(value):
            raise InvalidValueError("a plain relative file name", repr(value))
        return value


class MadeWith(Frozen):
    """What the bytes depend on, beside the request, where a method decomposes the base anew whenever it is loaded."""

    method: str
    """PEFT's name of it."""
    stable: bool
    """False where the merged weights move by more than rounding with what is named here."""
    num_threads: Annotated[int, Field(ge=1)]
    """That torch computed with."""
    cpu_capability: str
    """Vector instructions that torch chose, such as AVX2."""
    processor: str
    """Model of the processor, as the system names it."""
    blas: str
    """Library of linear algebra that torch was built with, and the settings of it in the environment."""


class Manifest(Frozen):
    """Written last. A release exists when, and only when, its manifest does. Same request, same bytes."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    merge_key: Sha256
    request_id: str
    base: LocationField
    base_digest: Sha256
    adapter: LocationField | None = Field(default=None, exclude_if=is_none)
    """None where several were combined."""
    adapters: tuple[CombinedAdapter, ...] | None = Field(default=None, exclude_if=is_none)
    combination: Combination | None = Field(default=None, exclude_if=is_none)
    adapter_digest: Sha256
    """Of the adapter, or of the digests of all that were combined."""
    base_quantization: BaseQuantization
    quantization_options: QuantizationOptions | None
    dtype: Dtype | None
    output: OutputForm | None = Field(default=None, exclude_if=is_none)
    """Where the release is stored in another form than plain numbers."""
    kept: KeptWeights | None = Field(default=None, exclude_if=is_none)
    """That of the parity report."""
    parity: ParitySummary
    approved_by: str | None = Field(default=None, exclude_if=is_none)
    """The person who let it be published, where the request asked for one."""
    notes: tuple[str, ...] = Field(default=(), exclude_if=is_empty)
    """Those of the parity report."""
    files: tuple[Artifact, ...]
    versions: dict[str, str]
    """Versions of the libraries that decided the bytes."""
    made_with: MadeWith | None = Field(default=None, exclude_if=is_none)
    """Only of methods whose bytes depend on it: there, the same request gives the same bytes with this alone."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(artifact.num_bytes for artifact in self.files)


class Release(Frozen):
    """A published release and where it is."""

    location: LocationField
    manifest: Manifest
    manifest_sha256: Sha256
    created: bool
    """False when the same release was there already and nothing was written."""
