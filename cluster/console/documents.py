"""What the command line prints with `--json`: plain values made from records, outcomes and events."""

import dataclasses
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.console.progress import BaseProgress
from jobs.errors import MergefleetError
from jobs.ledger.pauses import Pause
from jobs.ledger.records import BatchRecord, Event, JobRecord
from jobs.release import Manifest, Release
from jobs.request import MergeRequest
from jobs.request_files.problems import RequestFileError
from jobs.states import JobState
from workers.merging.outcomes import Failure

if TYPE_CHECKING:
    from workers.unit.estimate import Preview


def job_document(record: JobRecord) -> dict[str, Any]:
    """Return a job as `status` shows it."""
    request = record.request
    return {
        "id": record.id,
        "state": record.state.value,
        "stage": record.stage,
        "base": str(request.base),
        **adapter_document(request),
        "base_quantization": request.base_quantization.value,
        "destination": str(request.destination),
        "priority": request.priority,
        "labels": request.labels,
        "batch": record.batch,
        "held_by": record.held_by or None,
        "attempts": record.attempts,
        "worker": record.worker,
        "node": record.node,
        "started_at": record.started_at,
        "worker_losses": record.worker_losses,
        "bytes_done": record.bytes_done,
        "bytes_total": record.bytes_total,
        "failure": None
        if record.failure_class is None
        else {"class": record.failure_class.value, "message": record.failure_message},
        "release": None if record.release is None else release_document(record.release),
        "report_path": record.report_path,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
    }


def batch_document(batch: BatchRecord) -> dict[str, Any]:
    """Return a batch, with its counts as batch APIs have them, and by state."""
    counts = batch.counts
    return {
        "name": batch.name,
        "created_at": batch.created_at,
        "request_counts": {
            "total": sum(counts.values()),
            "completed": counts[JobState.PUBLISHED],
            "failed": counts[JobState.FAILED] + counts[JobState.QUARANTINED],
            "cancelled": counts[JobState.CANCELLED],
        },
        "counts": {state.value: count for state, count in counts.items() if count},
    }


def event_document(event: Event) -> dict[str, Any]:
    """Return one step in the life of a job, within the job's own document."""
    return {"sequence": event.sequence, "at": event.at, "state": event.state.value, "detail": event.detail}


def adapter_document(request: MergeRequest) -> dict[str, Any]:
    """Return which adapter a request merges, or which ones and how they are combined."""
    if request.combination is None:
        return {"adapter": str(request.adapter)}
    return request.model_dump(mode="json", include={"adapters", "combination"}, exclude_none=True)


def release_document(release: Release) -> dict[str, Any]:
    """Return a release: where it is, what it is, and its parity figures."""
    return {
        "location": str(release.location),
        "manifest_sha256": release.manifest_sha256,
        "created": release.created,
        **manifest_document(release.manifest),
    }


def manifest_document(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says, without the list of files."""
    return {
        "merge_key": manifest.merge_key,
        "request_id": manifest.request_id,
        "num_files": len(manifest.files),
        "num_bytes": manifest.num_bytes,
        "parity": manifest.parity.model_dump(mode="json"),
        "notes": list(manifest.notes),
        **({} if manifest.kept is None else {"kept": manifest.kept.model_dump(mode="json")}),
    }


def failure_document(failure: Failure | None) -> dict[str, str] | None:
    """Return why something failed."""
    return None if failure is None else {"class": failure.failure_class.value, "message": failure.message}


def preview_document(each: "Preview") -> dict[str, Any]:
    """Return what a request would do, as `plan` shows it."""
    return {
        "id": each.request.id,
        "base": str(each.request.base),
        **adapter_document(each.request),
        "destination": str(each.request.destination),
        "plan": plain(each.estimate),
        "notes": list(each.notes),
        "failure": failure_document(each.failure),
    }


def progress_document(
    progress: Sequence[BaseProgress], seconds_left: float | None, pauses: Sequence[Pause]
) -> dict[str, Any]:
    """Return how far jobs are, as `watch` shows it."""
    return {
        "event": "progress",
        "bases": [plain(each) for each in progress],
        "paused": [plain(each) for each in pauses],
        "seconds_left": seconds_left,
    }


def error_document(error: MergefleetError) -> dict[str, Any]:
    """Return an error; a request file's with every problem by itself."""
    document: dict[str, Any] = {"class": error.failure_class.value, "message": str(error)}
    if isinstance(error, RequestFileError):
        document["problems"] = [plain(problem) for problem in error.problems]
    return {"error": document}


def plain(value: Any) -> Any:
    """Return a frozen value as JSON knows it: dataclasses as objects, enums by value, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(each) for each in value]
    return value
