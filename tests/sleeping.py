"""Workers with the methods of `MergeWorker` that sleep instead of merging, and what a test asks of a pool of them."""

import os
import time
from pathlib import Path

from cluster.fleet.crews import Crew
from jobs.errors import FailureClass
from jobs.request import MergeRequest
from workers.merging.outcomes import (
    Failure,
    JobOutcome,
    MergedShards,
    PassOpened,
    Piece,
    Progress,
    PublishOutcome,
    Readiness,
    ShardsOutcome,
    UnitOutcome,
    Unreachable,
    Usage,
)
from workers.releases.sinks import Ticket

CREW = Crew(num_workers=2, device="cpu", num_threads=3)


class SleepingWorker:
    """Takes as long as it is told; says its pid in its progress."""

    def __init__(self, directory, die=None, needs=None):
        self.directory = directory
        self.die = die
        self.needs = needs  # a file without which its GPU is of no use
        self.cancelled = frozenset()
        self.unit = ""

    def ready(self):
        usable = self.needs is None or Path(self.needs).exists()
        return Readiness(host="gpu-7", fault=None if usable else "device 'cuda' cannot be used: ECC error")

    def run_unit(self, name, requests):
        self.unit = name
        self.cancelled = frozenset()
        for request in requests:
            if request.labels.get("raise"):
                raise ValueError(request.labels["raise"])
            if request.labels.get("dies"):
                self.die()
        seconds = float(requests[0].labels.get("seconds", "0"))
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.cancelled:
            time.sleep(0.02)
        if requests[0].labels.get("breaks"):
            failure = Failure(failure_class=FailureClass.WORKER_LOST, message="the GPU failed at work")
            return UnitOutcome(jobs=(JobOutcome(job_id=requests[0].id, failure=failure),), usage=Usage(), residents=())
        return UnitOutcome(
            jobs=tuple(self._outcome(request) for request in requests),
            usage=Usage(bytes_read=100, bytes_written=200, seconds={"merge": seconds + 0.5}),
            residents=(requests[0].pass_key(),),
        )

    def _outcome(self, request):
        if request.id in self.cancelled:
            failure = Failure(failure_class=FailureClass.CANCELLED, message="cancelled")
            return JobOutcome(job_id=request.id, failure=failure)
        return JobOutcome(job_id=request.id, merge_key="a" * 64)

    def open_pass(self, pass_id, name, requests):
        self.unit = name
        tickets = {each.id: Ticket(directory=Path("/s"), attempt=pass_id, merge_key="a" * 64) for each in requests}
        piece = Piece(shards=("model.safetensors",), num_bytes=1)
        return PassOpened(ended=(), tickets=tickets, pieces=(piece,), bytes_total=2, usage=Usage())

    def merge_shards(self, work, shards):
        if work.requests[0].labels.get("elsewhere"):
            return Unreachable(reason="not to be seen from here")
        checks = tuple(sorted(shards))
        merged = MergedShards(receipts=(), checks=checks, wrong=())
        merged = dict.fromkeys(work.tickets, merged)
        return ShardsOutcome(merged=merged, ended=(), usage=Usage(), residents=("held",))

    def finish_pass(self, work, merged):
        assert merged.keys() == work.tickets.keys()
        return UnitOutcome(jobs=(JobOutcome(job_id="one", merge_key="a" * 64),), usage=Usage(), residents=())

    def publish(self, job_id, approved_by):
        assert approved_by == ("someone" if job_id == "one" else None)
        if job_id == "raises":
            raise ValueError("no such job")
        return PublishOutcome(job_id=job_id, seconds=0.1)

    def leave(self, job_id):
        self.unit = f"left {job_id}"

    def discard(self, job_id):
        pass

    def progress(self):
        if self.unit == "silent":
            time.sleep(3)
        stages = {"pid": str(os.getpid()), "threads": os.environ.get("OMP_NUM_THREADS", "")}
        return Progress(unit=self.unit, stages=stages, bytes_done=1, bytes_total=2)

    def cancel(self, job_ids):
        self.cancelled |= job_ids

    def residents(self):
        return ()

    def close(self):
        Path(self.directory, f"closed-{id(self)}-{os.getpid()}").touch()


class BrokenWorker(SleepingWorker):
    """Never starts."""

    def __init__(self, *_):
        raise OSError("no space left on device")


def request(name="one", **labels):
    """Return a request whose labels tell the worker what to do."""
    return MergeRequest(id=name, base="/b", adapter=f"/a/{name}", destination=f"/r/{name}", labels=labels)


def until(pool, kind, *, seconds=30.0, num=1):
    """Poll until `num` events of a kind have come; return all events on the way."""
    events = []
    end = time.monotonic() + seconds
    while sum(isinstance(event, kind) for event in events) < num:
        assert time.monotonic() < end, events
        events += pool.poll(0.2)
    return events


def ready(pool, num=2):
    """Poll until so many workers are idle."""
    end = time.monotonic() + 60
    while sum(view.idle for view in pool.views()) < num:
        assert time.monotonic() < end, pool.views()
        pool.poll(0.2)


def last(events, kind):
    """Return the last event of a kind."""
    return [event for event in events if isinstance(event, kind)][-1]
