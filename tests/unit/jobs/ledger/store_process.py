"""A process beside others on one store; started by the tests, which kill some of them.

Says what it did on standard output, each line after the transaction it speaks of. Waits for a line on standard input
before it starts, so that several begin together.
"""

import random
import sys
import time

from jobs.errors import FailureClass, LeaseLostError
from jobs.ledger.records import Fault
from jobs.ledger.store import JobStore
from jobs.parity_report import ParitySummary
from jobs.release import Manifest, Release
from jobs.request import BaseQuantization, MergeRequest
from jobs.states import Decision, JobState
from tests.releases import advance, progress_of, settle

NUM_REQUESTS = 40
PLACE = "file:///releases"
"""What all jobs write to."""
RETRY_NOW = Decision(state=JobState.RETRY_WAIT)
STAGES = (JobState.PLANNING, JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING)


def say(*words):
    print(*words, flush=True)  # noqa: T201 - the tests read it


def claim_all(url, name):
    store = JobStore(url)
    while leases := store.claim(name, 3, 600):
        for lease in leases:
            say("claimed", lease.job_id)


def submit(url, _name):
    places = {"base": "/b", "adapter": "/a"}
    requests = [
        MergeRequest(id=f"r{index}", destination=f"/releases/{index}", **places) for index in range(NUM_REQUESTS)
    ]
    for job_id in JobStore(url).submit(requests).created:
        say("created", job_id)


def work(url, name):
    """Drive every job to its release, with failures, faults of its place and leases that are too short on the way."""
    store = JobStore(url)
    rng = random.Random(name)
    while store.seconds_until_due() is not None:
        for lease in store.claim(name, 4, 0.5):
            try:
                attempt(store, lease, rng.random())
            except LeaseLostError:
                say("lost", lease.job_id)
        time.sleep(0.01)


def attempt(store, lease, luck):
    for state in STAGES:
        advance(store, lease.job_id, lease.token, state)
        store.report_progress(progress_of({lease.job_id: lease.token}, stage=state, bytes_done=1, bytes_total=2))
    if luck < 0.3:
        store.fail(lease.job_id, lease.token, FailureClass.TRANSIENT_IO, "bad luck", RETRY_NOW)
    elif luck < 0.4:
        store.let_go(lease.job_id, lease.token, "bad luck")
    elif luck < 0.5:
        fault = Fault(place=PLACE, failure=FailureClass.TRANSIENT_IO, message="bad luck")
        rest = {"first_seconds": 0.02, "max_seconds": 0.05}
        said = {"by": "driver", "failure": fault.failure, "reason": fault.message, "state": JobState.PUBLISHING}
        store.pause_place(PLACE, lease.job_id, **said, **rest)
        store.let_go(lease.job_id, lease.token, "bad luck", fault)
    else:
        settle(store, lease.job_id, lease.token, a_release(lease.request), None)
        say("settled", lease.job_id)
        if lease.is_probe:
            store.passed(lease.job_id, JobState.PUBLISHED)


def a_release(request):
    parity = ParitySummary(
        level="arithmetic",
        num_tensors=1,
        num_changed_tensors=1,
        rounding_excess=0.1,
        min_survival=None,
        mean_kl=None,
        top1_agreement=None,
    )
    manifest = Manifest(
        merge_key="a" * 64,
        request_id=request.id,
        base=request.base,
        base_digest="b" * 64,
        adapter=request.adapter,
        adapter_digest="c" * 64,
        base_quantization=BaseQuantization.NF4,
        quantization_options=None,
        dtype=None,
        parity=parity,
        files=(),
        versions={},
    )
    return Release(location=request.destination, manifest=manifest, manifest_sha256="d" * 64, created=True)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    say("ready")
    sys.stdin.readline()
    {"claim_all": claim_all, "submit": submit, "work": work}[command](*arguments)
