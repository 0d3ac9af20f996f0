"""Records of finished shards: what lets a later attempt at the same release use them without trusting a name.

A record is JSON behind its own SHA-256, so that what was torn off or edited is none. See decision 24.
"""

import hashlib
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from jobs.frozen import Frozen, Sha256, is_empty, is_none
from jobs.kept import KeptWeight
from jobs.parity_report import TensorCheck
from jobs.release import Artifact

MAX_RECORD_BYTES = 64 << 20
"""As a parity report, which holds no less."""
_DIGEST_CHARACTERS = 64


class RecordedPart(Frozen):
    """One part of an upload, as the store answered when it was sent."""

    number: Annotated[int, Field(ge=1)]
    etag: str
    crc: str
    """CRC-64/NVME, in base64."""


class RecordedUpload(Frozen):
    """What a store that takes files in parts holds of a shard."""

    parts: tuple[RecordedPart, ...]
    crc: str
    """CRC-64/NVME of the whole file, in base64."""


class ShardRecord(Frozen):
    """One shard of a release that was written, shipped and checked, and found right."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    merge_key: Sha256
    origin: Sha256
    """Digest of what decides bits and report besides the merge key: versions, device, files of a local base."""
    artifact: Artifact
    checks: tuple[TensorCheck, ...]
    """Of every tensor in it."""
    kept: tuple[KeptWeight, ...] = Field(default=(), exclude_if=is_empty)
    """Weights of it that are kept in more bits than the release's form has."""
    upload: RecordedUpload | None = Field(default=None, exclude_if=is_none)
    """Where its parts wait at a store."""


def encode_record(record: ShardRecord) -> bytes:
    """Return the one form in which a record is kept."""
    body = record.model_dump_json(by_alias=True).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode_record(data: bytes, merge_key: str) -> ShardRecord | None:
    """Read what may be a record of a release; None where it is torn, edited, another's, or something else.

    Args:
        data: the bytes that were found.
        merge_key: of the release.
    """
    digest, body = data[:_DIGEST_CHARACTERS], data[_DIGEST_CHARACTERS + 1 :]
    if len(data) > MAX_RECORD_BYTES or hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    try:
        record = ShardRecord.model_validate_json(body)
    except ValidationError:
        return None
    return record if record.merge_key == merge_key else None
