"""The promises, held against the ledger's events, the bucket and the directories: nothing that a driver says counts."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.locations import parse_location
from jobs.release import MANIFEST_NAME
from jobs.states import TRANSITIONS, JobState
from tests.chaos.campaign.ledger import LedgerSight, Seen
from tests.servers.s3 import S3Server
from workers.releases.delivery import verify_release
from workers.releases.trails import TRAILS

_CHARGED = frozenset({"worker_lost", "out_of_memory"})
"""What an attempt of a good job may be counted for in a campaign: the loss of a worker that it had to itself."""


def check_events(sight: LedgerSight, accepted: set[str], cancelled: set[str]) -> Iterator[str]:
    """Yield where the life of a job is not what was promised."""
    events = sight.events()
    rows = {row.id: row for row in sight.jobs()}
    for missing in sorted(accepted - rows.keys()):
        yield f"job '{missing}' was accepted, and is not in the ledger"
    for job_id, row in rows.items():
        lived = events.get(job_id, [])
        states = Counter(each.state for each in lived)
        if states["PUBLISHED"] != 1 and not (job_id in cancelled and row.state == "CANCELLED"):
            yield f"job '{job_id}' is {row.state}, and was published {states['PUBLISHED']} times: {_last(lived)}"
        for state in ("FAILED", "QUARANTINED"):
            if states[state]:
                yield f"job '{job_id}' was {state} by a fault of its surroundings: {_last(lived, state)}"
        yield from _check_life(job_id, lived)
        yield from _check_attempts(job_id, lived)


def _check_life(job_id: str, lived: list[Seen]) -> Iterator[str]:
    """Yield where transitions are not legal, or tokens do not grow."""
    state: JobState | None = None
    token = 0
    for number, each in enumerate(lived, start=1):
        if each.sequence != number:
            yield f"job '{job_id}': event {number} has the number {each.sequence}"
        if state is not None and JobState(each.state) not in TRANSITIONS[state]:
            yield f"job '{job_id}': went from {state} to {each.state}"
        state = JobState(each.state)
        if state is JobState.LEASED:
            if each.detail["token"] <= token:
                yield f"job '{job_id}': token {each.detail['token']} after {token}"
            token = each.detail["token"]


def _check_attempts(job_id: str, lived: list[Seen]) -> Iterator[str]:
    """Yield where an attempt was counted that a place, the loss of a driver or a stop has ended."""
    counted = 0
    for each in lived:
        if each.state == "PLANNING":
            found = each.detail["attempt"]
            if found != counted + 1:
                yield f"job '{job_id}': expected attempt {counted + 1} at event {each.sequence}, found {found}"
        elif each.detail.get("reason") == "retried":
            counted = 0
        elif each.state == "RETRY_WAIT" and "failure" in each.detail and "reason" not in each.detail:
            counted += 1
            if each.detail["failure"] not in _CHARGED:
                yield f"job '{job_id}': an attempt was charged for a fault of its surroundings: {each.detail}"


def check_releases(sight: LedgerSight, releases: Path, scratch: Path, s3: S3Server) -> Iterator[str]:
    """Yield where what is published is not whole, not alone, or not what the ledger says."""
    keys: set[str] = set()
    names: set[str] = set()
    for row in sight.jobs("PUBLISHED"):
        (published,) = [each for each in sight.events_of(row.id) if each.state == "PUBLISHED"][:1]
        told = (published.detail["location"], published.detail["merge_key"])
        if told != (row.destination, row.merge_key):
            yield f"job '{row.id}' was published as {told}, and the ledger has {row.destination}, {row.merge_key}"
        try:
            manifest = verify_release(parse_location(row.destination), scratch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the release does not verify
            yield f"job '{row.id}': its release does not verify: {type(error).__name__}: {error}"
            continue
        if manifest.merge_key != row.merge_key:
            yield f"job '{row.id}': its manifest has the merge key {manifest.merge_key}, the ledger {row.merge_key}"
        files = {artifact.path for artifact in manifest.files} | {MANIFEST_NAME}
        if row.destination.startswith("s3://"):
            keys |= {f"{row.destination.removeprefix(f's3://{s3.bucket}/')}/{name}" for name in files}
        else:
            path = Path(row.destination)
            names.add(path.name)
            if found := {str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()} ^ files:
                yield f"job '{row.id}': {sorted(found)} are too many in its directory, or missing"
    cancelled = {f"{row.destination.removeprefix(f's3://{s3.bucket}/')}/" for row in sight.jobs("CANCELLED")}
    yield from _check_bucket(s3, keys, tuple(cancelled))
    for path in sorted(releases.iterdir()):
        if path.name not in names:
            yield f"{path} lies beside the releases"


def _check_bucket(s3: S3Server, expected: set[str], cancelled: tuple[str, ...]) -> Iterator[str]:
    """Yield objects that belong to no release, or are missing, and uploads that were never ended."""
    client = s3.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3.bucket, Prefix="releases/")
    keys = {entry["Key"] for page in pages for entry in page.get("Contents", [])}
    for key in sorted(keys - expected):
        whose = " but to a job that was cancelled" if key.startswith(cancelled) else ""
        yield f"{key} lies in the bucket, and belongs to no release{whose}"
    for key in sorted(expected - keys):
        yield f"{key} is not in the bucket"
    for entry in client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", []):
        yield f"the upload of {entry['Key']} was never completed nor aborted"


def check_leftovers(scratch: Path) -> Iterator[str]:
    """Yield what is left of work that has ended."""
    for path in sorted(path for path in scratch.rglob("*") if path != scratch / TRAILS):
        yield f"{path} was left in the scratch directory"


def check_ledger(sight: LedgerSight) -> Iterator[str]:
    """Yield what keeps jobs back although all faults are over."""
    for row in sight.pauses():
        yield f"{row.scope} {row.name} is paused still: {row.reason}"


def _last(lived: list[Seen], state: str | None = None) -> Any:
    chosen = [each for each in lived if state in (None, each.state)]
    return json.dumps([[each.state, each.detail] for each in chosen[-3:]])[:700]
