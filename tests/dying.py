"""A worker that kills itself in the middle of a merge, at a place that a test names.

    python -m tests.dying '{"requests": [...], "directory": "...", "die": "record", "after": 2}'

`record`: when so many shards have records; `put`: when so many are put, before the last of them has its record;
`staged`: when all is ready to be published; `complete` (S3): when so many objects have appeared.
"""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workers.releases.sinks.s3_objects
import workers.unit.uploading
from jobs.locations import LocalPath, S3Prefix
from jobs.request import MergeRequest
from workers.merging.settings import WorkerSettings
from workers.releases.sinks.directory import DirectoryStaging
from workers.releases.sinks.hub import HubStaging
from workers.releases.sinks.local_records import LocalRecords
from workers.releases.sinks.s3_kept import S3Records
from workers.releases.sinks.s3_staging import S3Staging
from workers.releases.sinks.s3_upload import Upload
from workers.worker import MergeWorker


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(owner: Any, name: str, number: int) -> None:
    """Have a method kill this process when it has returned for the n-th time."""
    method: Callable[..., Any] = getattr(owner, name)
    calls = []

    @functools.wraps(method)
    def counted(*args: Any, **options: Any) -> Any:
        result = method(*args, **options)
        calls.append(args)
        if len(calls) == number:
            die()
        return result

    setattr(owner, name, counted)


def settings_in(directory: Path) -> WorkerSettings:
    """Return the settings of a worker below a directory; one that is killed and the next one have the same."""
    return WorkerSettings(
        cache=directory / "cache",
        scratch=directory / "scratch",
        reports=directory / "reports",
        device="cpu",
        num_threads=2,
    )


def staging_of(request: MergeRequest) -> type:
    """Return the class of a request's staging."""
    match request.destination:
        case LocalPath():
            return DirectoryStaging
        case S3Prefix():
            return S3Staging
        case _:
            return HubStaging


def main(told: dict[str, Any]) -> None:
    workers.unit.uploading._NUM_UPLOADS = 1  # one shard after the other is put and recorded
    workers.releases.sinks.s3_objects.MIN_PART_BYTES = 5 << 20
    requests = tuple(MergeRequest.model_validate(request) for request in told["requests"])
    match told["die"]:
        case "record":
            is_s3 = isinstance(requests[0].destination, S3Prefix)
            die_after(S3Records if is_s3 else LocalRecords, "keep", told["after"])
        case "put":
            die_after(staging_of(requests[0]), "put", told["after"])
        case "complete":
            die_after(Upload, "complete", told["after"])
    worker = MergeWorker(settings_in(Path(told["directory"])))
    outcome = worker.run_unit("unit", requests)
    failures = [job.failure for job in outcome.jobs if job.failure]
    assert not failures, failures
    if told["die"] == "staged":
        die()
    for request in requests:
        worker.publish(request.id)
    raise AssertionError("it was to die before this")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
