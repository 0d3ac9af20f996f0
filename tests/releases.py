"""Small releases: files of random bytes, and a manifest that is true to them."""

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path

from jobs.ledger.records import Beginning, ProgressReport, Publication
from jobs.ledger.store import JobStore
from jobs.locations import LocalPath
from jobs.parity_report import ParitySummary, TensorCheck
from jobs.release import REPORT_NAME, Artifact, Manifest, Release
from jobs.request import BaseQuantization
from jobs.states import JobState
from workers.releases.records import ShardRecord
from workers.releases.sinks import Staging
from workers.releases.trails import TRAILS, follow_trails

SHARD, SMALL = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARD_BYTES = (5 << 20) + 12_345
"""More than the smallest part that S3 knows."""


def make_files(seed: int = 0, merge_key: str = "a" * 64) -> dict[str, bytes]:
    """Return the files of a release, by name: two shards of which one is large, and sidecars."""
    rng = random.Random(seed)
    return {
        SHARD: rng.randbytes(SHARD_BYTES),
        SMALL: rng.randbytes(70_000),
        "config.json": b'{"seed": %d}\n' % seed,
        REPORT_NAME: make_report(merge_key),
        "tokenizer.json": b"{}\n" * 100,
        "templates/tool.jinja": b"{{ messages }}\n",
        "empty.txt": b"",
    }


def make_report(merge_key: str) -> bytes:
    """Return a parity report that agrees with the manifests made here."""
    check = {"changed": True, "max_abs_error": 0.0, "rounding_excess": 0.5}
    report = {
        "schema": 1,
        "request_id": "job-1",
        "merge_key": merge_key,
        "base": "/bases/b",
        "adapter": "/adapters/a",
        "base_quantization": "none",
        "level": "arithmetic",
        "thresholds": {},
        "passed": True,
        "failures": [],
        "tensors": [{"tensor": "x", **check}, {"tensor": "y", **check, "changed": False, "rounding_excess": 0.0}],
    }
    return json.dumps(report).encode()


def make_manifest(files: dict[str, bytes], *, merge_key: str = "a" * 64, request_id: str = "job-1") -> Manifest:
    """Return the manifest of some files."""
    return Manifest(
        merge_key=merge_key,
        request_id=request_id,
        base=LocalPath(Path("/bases/b")),
        base_digest="b" * 64,
        adapter=LocalPath(Path("/adapters/a")),
        adapter_digest="c" * 64,
        base_quantization=BaseQuantization.NONE,
        quantization_options=None,
        dtype=None,
        parity=ParitySummary(
            level="arithmetic",
            num_tensors=2,
            num_changed_tensors=1,
            rounding_excess=0.5,
            min_survival=None,
            mean_kl=None,
            top1_agreement=None,
        ),
        files=tuple(
            Artifact(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in sorted(files.items())
        ),
        versions={"torch": "2.13.0"},
    )


KEY = "a" * 64
FILES = make_files()


def artifact_of(name: str) -> Artifact:
    """Return one of `FILES` as a manifest names it."""
    return next(artifact for artifact in make_manifest(FILES).files if artifact.path == name)


def record_of(name: str, merge_key: str = KEY) -> ShardRecord:
    """Return a record of one of `FILES`."""
    check = TensorCheck(tensor="x", changed=True, max_abs_error=1 / 3, rounding_excess=0.5, survival=1e-300)
    return ShardRecord(merge_key=merge_key, origin="0" * 64, artifact=artifact_of(name), checks=(check,))


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Write files below a directory."""
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def fill(staging: Staging, files: dict[str, bytes], merge_key: str = "a" * 64) -> Manifest:
    """Write and put all files of a release; its manifest is what is left to publish."""
    write_files(staging.directory, files)
    manifest = make_manifest(files, merge_key=merge_key)
    for artifact in manifest.files:
        staging.put(artifact)
    return manifest


def left_in(scratch: Path) -> list[Path]:
    """Return all that lies in a worker's scratch directory, once the trails of the dead have been followed."""
    follow_trails(scratch)
    return sorted(path for path in scratch.rglob("*") if path != scratch / TRAILS)


def progress_of(leases: Mapping[str, int], *, stage: str, bytes_done: int, bytes_total: int) -> list[ProgressReport]:
    """Return the same progress of several jobs, given with the tokens of their leases."""
    how_far = {"stage": stage, "bytes_done": bytes_done, "bytes_total": bytes_total}
    return [ProgressReport(job_id=job_id, token=token, **how_far) for job_id, token in leases.items()]


def begin(store: JobStore, job_id: str, token: int, worker: str = "merge-worker-0", node: str = "node") -> None:
    """Start work on one job; what the store says against it is raised."""
    for error in store.begin([Beginning(job_id=job_id, token=token, worker=worker, node=node)]).values():
        raise error


def advance(store: JobStore, job_id: str, token: int, state: JobState, merge_key: str | None = None) -> None:
    """Move one job on; what the store says against it is raised."""
    if state is JobState.PLANNING:
        begin(store, job_id, token)
        return
    keys = None if merge_key is None else {job_id: merge_key}
    for error in store.advance({job_id: token}, state, keys).values():
        raise error


def settle(store: JobStore, job_id: str, token: int, release: Release, report_path: str | None = None) -> None:
    """Record one release; what the store says against it is raised."""
    publication = Publication(job_id=job_id, token=token, release=release, report_path=report_path)
    for error in store.settle([publication]).values():
        raise error
