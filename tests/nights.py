"""A ledger after a night: jobs of one batch on some workers, on a clock of its own, a known number of them bad.

Every row is written by the ledger itself, as a driver has it written; only time and outcomes are made up.
"""

import random
from pathlib import Path

from jobs.errors import FailureClass
from jobs.ledger.records import Beginning, Fault, Lease, Publication
from jobs.ledger.store import JobStore
from jobs.locations import parse_location
from jobs.parity_report import ParitySummary
from jobs.release import Artifact, Manifest, Release
from jobs.request import MergeRequest
from jobs.states import Decision, JobState

BEGAN = 1_790_000_000.0
BUCKET = "s3://releases"
BATCH = "nightly"
_PER_PASS = 4


class Night:
    """The store, and its clock."""

    def __init__(self, directory: Path, *, num_workers: int = 2, seed: int = 0) -> None:
        self.now = BEGAN
        self.store = JobStore(f"sqlite:///{directory}/night.db", lambda: self.now)
        self.rng = random.Random(seed)
        self.free_at = dict.fromkeys([f"merge-worker-{number}" for number in range(num_workers)], BEGAN)

    def submit(self, num_jobs: int, *, prefix: str = "job") -> None:
        """Queue jobs with destinations in one bucket."""
        requests = [
            MergeRequest(
                id=f"{prefix}-{number:05}",
                base="/bases/llama",
                adapter=f"/adapters/{prefix}-{number}",
                destination=f"{BUCKET}/{prefix}-{number}",
            )
            for number in range(num_jobs)
        ]
        self.store.submit(requests, BATCH)

    def pass_of(self, limit: int = _PER_PASS) -> tuple[str, tuple[Lease, ...]]:
        """Claim jobs for the worker that is free first, and begin them."""
        worker = min(self.free_at, key=lambda name: self.free_at[name])
        self.now = max(self.now, self.free_at[worker])
        leases = self.store.claim("driver", limit, 3600)
        node = f"node-{int(worker.rpartition('-')[2]) // 8}"
        self.store.begin(
            Beginning(
                job_id=each.job_id, token=each.token, worker=worker, node=node, log=f"{worker}@{node}@driver.jsonl"
            )
            for each in leases
        )
        return worker, leases

    def work(self, worker: str, leases: tuple[Lease, ...], seconds: float = 40.0) -> float:
        """Take a pass as far as its end, which is when the worker is free again."""
        tokens = {each.job_id: each.token for each in leases}
        begin = self.now
        self.now = begin + 0.1 * seconds
        self.store.advance(tokens, JobState.MERGING)
        self.now = begin + 0.7 * seconds
        self.store.advance(tokens, JobState.VERIFYING)
        self.now = begin + 0.95 * seconds
        self.free_at[worker] = begin + seconds
        return begin

    def publish(self, leases: tuple[Lease, ...], seconds: float = 40.0) -> None:
        """Publish the jobs of a pass."""
        tokens = {each.job_id: each.token for each in leases}
        unit = {
            "jobs": len(leases),
            "bytes_read": 2_000_000_000,
            "bytes_written": 2_000_000_000 * len(leases),
            "bytes_uploaded": 2_000_000_000 * len(leases),
            "seconds": {"fetch": 0.05 * seconds, "merge": 0.6 * seconds, "behaviour": 0.25 * seconds},
        }
        keys = {job_id: f"{self.rng.getrandbits(256):064x}" for job_id in tokens}
        self.store.advance(tokens, JobState.PUBLISHING, keys, {"unit": unit})
        self.now += 0.05 * seconds
        self.store.settle(
            [
                Publication(
                    job_id=each.job_id,
                    token=each.token,
                    release=self.release(each.request, keys[each.job_id]),
                    report_path=f"/reports/{each.job_id}",
                )
                for each in leases
            ]
        )

    def release(self, request: MergeRequest, merge_key: str) -> Release:
        """Return a release with figures of parity as they come."""
        parity = ParitySummary(
            level="full",
            num_tensors=200,
            num_changed_tensors=100,
            rounding_excess=1.0 - self.rng.betavariate(2, 40),
            min_survival=1.0 + self.rng.gauss(0, 3e-4),
            mean_kl=10 ** self.rng.gauss(-4.6, 0.35),
            top1_agreement=1.0 - self.rng.betavariate(2, 200),
        )
        manifest = Manifest(
            merge_key=merge_key,
            request_id=request.id,
            base=request.base,
            base_digest="b" * 64,
            adapter=request.adapter,
            adapter_digest="c" * 64,
            base_quantization="none",
            quantization_options=None,
            dtype=None,
            parity=parity,
            files=tuple(
                Artifact(path=f"model-{number:05}.safetensors", num_bytes=500_000_000, sha256="d" * 64)
                for number in range(4)
            ),
            versions={},
        )
        location = parse_location(str(request.destination))
        return Release(location=location, manifest=manifest, manifest_sha256="e" * 64, created=True)

    def fail(self, lease: Lease, failure: FailureClass, message: str, *, again: bool = False) -> None:
        """End one attempt that counts."""
        state = JobState.RETRY_WAIT if again else JobState.FAILED
        self.store.fail(lease.job_id, lease.token, failure, message, Decision(state=state))

    def meet_fault(self, lease: Lease, state: JobState, place: str = BUCKET) -> None:
        """End one attempt by a fault of a place, which is paused."""
        message = f"{place}: the store does not answer"
        self.store.pause_place(
            place,
            lease.job_id,
            by="driver",
            failure=FailureClass.TRANSIENT_IO,
            reason=message,
            state=state,
            first_seconds=60.0,
            max_seconds=300.0,
        )
        fault = Fault(place=place, failure=FailureClass.TRANSIENT_IO, message=message)
        self.store.let_go(lease.job_id, lease.token, f"{place} is at fault: not charged", fault)


def spend(night: Night, num_jobs: int) -> None:
    """Have a night pass: a bucket is away for a while, one adapter in forty is wrong, one in ninety fails parity."""
    night.submit(num_jobs)
    back_at = None
    done = 0
    while True:
        worker, leases = night.pass_of()
        if not leases:
            due = night.store.seconds_until_due()
            if due is None:
                return
            night.now += max(due, 1.0)
            continue
        seconds = night.rng.uniform(25, 70)
        begin = night.work(worker, leases, seconds)
        share = done / num_jobs
        if back_at is None and share > 0.3:
            back_at = night.now + 90.0
        is_away = back_at is not None and night.now < back_at
        good = tuple(each for each in leases if not _goes_wrong(night, each, is_away=is_away))
        if good:
            night.publish(good, seconds)
            for each in good:
                night.store.passed(each.job_id, JobState.PUBLISHED)
        done += len(leases)
        night.now = begin


def _goes_wrong(night: Night, lease: Lease, *, is_away: bool) -> bool:
    """End the attempts that do not come as far as their release."""
    number = int(lease.job_id.rpartition("-")[2])
    if is_away:
        night.meet_fault(lease, JobState.VERIFYING)
    elif number % 40 == 7:
        night.fail(lease, FailureClass.BAD_INPUT, f"/adapters/{lease.job_id}: expected rank 8, found rank {number}")
    elif number % 90 == 11:
        night.fail(lease, FailureClass.PARITY_FAILED, f"tensor 'layers.{number}.q_proj': 3.2 of its bound")
    elif number % 30 == 3 and lease.attempts == 1:
        night.fail(lease, FailureClass.OUT_OF_MEMORY, "memory ran out", again=True)
    else:
        return False
    return True
