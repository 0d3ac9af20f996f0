"""What the state machine's model knows of jobs and pauses, and the small world they are in."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.ledger.pauses import Scope
from jobs.locations import LocalPath
from jobs.parity_report import ParitySummary
from jobs.release import Manifest, Release
from jobs.request import BaseQuantization, MergeRequest
from jobs.states import ACTIVE_STATES, JobState

IDS = "abcd"
BATCHES = ("one", "two")
HOUR = 3600.0
STAGES = (JobState.PLANNING, JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING)
DESTINATIONS = ("/out/zero", "/out/one", "s3://bucket/two")
PAUSABLE = [
    (Scope.QUEUE, ""),
    (Scope.BATCH, "one"),
    (Scope.BATCH, "two"),
    (Scope.BASE, "/base/ac"),
    (Scope.PLACE, "file:///out"),
    (Scope.PLACE, "s3://bucket"),
    (Scope.PLACE, "hf://"),
]
FAULTY = ["file:///out", "file:///out/one", "s3://bucket", "hf://", "node:x"]


@dataclass
class Job:
    """What the model knows of one job."""

    job_id: str
    number: int
    destination: int
    priority: int
    batch: str
    state: JobState = JobState.QUEUED
    token: int = 0
    attempts: int = 0
    excused: int = 0
    expired: bool = False
    waits: bool = False
    was_published: bool = False
    approved: bool = False
    tokens: list[int] = field(default_factory=list)
    owner: str = ""
    losses: int = 0
    """Losses of drivers in a row with it at work."""
    lost_with: str | None = None

    @property
    def is_held(self):
        return self.state in ACTIVE_STATES and not self.expired

    @property
    def has_begun(self):
        return self.state in STAGES


@dataclass
class FaultPause:
    """What the model knows of a place at fault."""

    state: JobState
    num_faults: int
    is_over: bool = False
    probe: str | None = None


def covers(key, job):
    """Whether a pause is of a job: said once more, and otherwise than the ledger says it."""
    scope, name = key
    its = {
        (Scope.QUEUE, ""),
        (Scope.BATCH, job.batch),
        (Scope.BASE, "/base/ac" if job.job_id in "ac" else "/base/bd"),
        *([(Scope.PLACE, "hf://")] if job.job_id in "cd" else []),
        *[
            [(Scope.PLACE, "file:///out")],
            [(Scope.PLACE, "file:///out"), (Scope.PLACE, "file:///out/one")],
            [(Scope.PLACE, "s3://bucket")],
        ][job.destination],
    }
    return (scope, name) in its


def a_request(job_id, destination, priority):
    return MergeRequest(
        id=job_id,
        base="/base/ac" if job_id in "ac" else "/base/bd",
        adapter="hf://org/adapter" if job_id in "cd" else "/adapters/a",
        destination=DESTINATIONS[destination],
        priority=priority,
    )


def a_release(job_id):
    summary = ParitySummary(
        level="full",
        num_tensors=1,
        num_changed_tensors=1,
        rounding_excess=0.1,
        min_survival=None,
        mean_kl=0.0,
        top1_agreement=1.0,
    )
    manifest = Manifest(
        merge_key="a" * 64,
        request_id=job_id,
        base="/b",
        base_digest="b" * 64,
        adapter="/a",
        adapter_digest="c" * 64,
        base_quantization=BaseQuantization.NF4,
        quantization_options=None,
        dtype=None,
        parity=summary,
        files=(),
        versions={},
    )
    return Release(location=LocalPath(Path("/out")), manifest=manifest, manifest_sha256="d" * 64, created=True)
