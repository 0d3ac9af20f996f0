"""What the fleet is given: two small bases, adapters, some of them in the bucket, and requests of every kind."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.request import MergeRequest
from tests.models import build_llama, make_adapter
from tests.servers.s3 import S3Server

_NUM_ADAPTERS = 4
KINDS = ("tiny", "tiny", "tiny", "bucket", "bucket", "wide", "full", "nf4")
"""As often as they come. `wide` takes a worker some time to merge, `full` to verify."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Bases and adapters on the disk, and adapters in the bucket."""

    directory: Path
    bucket: str


def build_models(directory: Path, s3: S3Server) -> Models:
    """Make the bases and adapters."""
    tiny = build_llama(directory / "tiny")
    wide = build_llama(
        directory / "wide", hidden_size=320, intermediate_size=896, num_hidden_layers=4, max_shard_size="3MB"
    )
    client = s3.client()
    for number in range(_NUM_ADAPTERS):
        adapter = make_adapter(tiny, directory / f"tiny-{number}", seed=number)
        make_adapter(wide, directory / f"wide-{number}", seed=number)
        for path in adapter.iterdir():
            client.upload_file(str(path), s3.bucket, f"adapters/tiny-{number}/{path.name}")
    return Models(directory=directory, bucket=s3.bucket)


def draw_request(
    models: Models, releases: Path, number: int, rng: random.Random, kind: str | None = None
) -> dict[str, Any]:
    """Draw one request.

    Args:
        models: what it merges.
        releases: where directories go.
        number: of the job.
        rng: source of what is drawn.
        kind: one of `KINDS`; drawn where it is not given.
    """
    kind = kind or rng.choice(KINDS)
    base = "wide" if kind == "wide" else "tiny"
    adapter = f"{base}-{rng.randrange(_NUM_ADAPTERS)}"
    name = f"{kind}-{number:03}"
    to_bucket = kind == "bucket" or (kind in ("full", "nf4") and rng.random() < 0.5)
    if kind == "bucket" and rng.random() < 0.5:
        source = f"s3://{models.bucket}/adapters/{adapter}"
    else:
        source = str(models.directory / adapter)
    return {
        "id": name,
        "base": str(models.directory / base),
        "adapter": source,
        "destination": f"s3://{models.bucket}/releases/{name}" if to_bucket else str(releases / name),
        "base_quantization": "nf4" if kind == "nf4" else "none",
        "parity": {"level": "full" if kind == "full" else "arithmetic"},
    }


def write_file(path: Path, requests: list[dict[str, Any]]) -> None:
    """Write a request file."""
    path.write_text(yaml.safe_dump({"requests": requests}))


def parsed(requests: list[dict[str, Any]]) -> list[MergeRequest]:
    """Return requests as the ledger takes them."""
    return [MergeRequest.model_validate(each) for each in requests]
