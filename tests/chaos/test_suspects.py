"""Twenty good jobs with one that kills its worker and one whose regex never ends: real Ray, workers and merges.

The worker that dies is the real one with a thread that ends its process, by the signal that the kernel's memory killer
sends, as soon as it merges the poisoned job: nothing an adapter may hold is to be able to do so.
"""

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

from cluster.driving.driver import Driver
from cluster.driving.events import JobSettled, UnitStarted, WorkerReplaced
from cluster.fleet.crews import Crew
from cluster.fleet.pool import WorkerPool
from cluster.ray_fleet.actors import RayActors
from cluster.ray_fleet.metrics import FleetMetrics
from cluster.ray_fleet.session import close_session, open_session
from cluster.settings import Settings, worker_settings
from jobs.errors import FailureClass
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import JobState
from tests.models import build_llama, make_adapter
from workers.releases.delivery import verify_release

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

GOOD = [f"good-{number:02}" for number in range(20)]
MAX_WORK_SECONDS = 60.0
CATASTROPHE = r"(?:[a-z_]+[.0-9]*)+!"
"""In the adapter's `target_modules`: against the name of a module it takes time that doubles with each letter, and it
holds the interpreter's lock meanwhile."""


@pytest.fixture
def session(tmp_path, monkeypatch):
    # Loops that are compiled by now: each new worker would compile them again.
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(Path.home() / ".cache" / "mergefleet"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="mf-", ignore_cleanup_errors=True) as short:
        settings = Settings(
            home=tmp_path / "fleet",
            ray_directory=short,
            poll_seconds=0.2,
            lease_seconds=60.0,
            retry_delay_seconds=0.1,
            unresponsive_seconds=6.0,
            dashboard=False,
        )
        open_session(settings, namespace="suspects", address=None, log_format="text")
        yield settings
        close_session()


@pytest.fixture
def requests(tmp_path):
    """Return them in an order in which the bad ones are in the midst of others, in different passes."""
    base = build_llama(tmp_path / "base")
    adapters = [make_adapter(base, tmp_path / f"adapter-{seed}", seed=seed) for seed in range(3)]
    bombed = make_adapter(base, tmp_path / "bombed")
    config = json.loads((bombed / "adapter_config.json").read_text())
    (bombed / "adapter_config.json").write_text(json.dumps(config | {"target_modules": CATASTROPHE}))
    chosen = {name: adapters[number % 3] for number, name in enumerate(GOOD)}
    names = [*GOOD[:3], "poisoned", *GOOD[3:11], "bombed", *GOOD[11:]]
    return [
        MergeRequest(
            id=name,
            base=str(base),
            adapter=str(chosen.get(name, bombed if name == "bombed" else adapters[0])),
            destination=str(tmp_path / "releases" / name),
            base_quantization="none",
            parity={"level": "arithmetic"},
        )
        for name in names
    ]


def mortal_worker():
    """Return the class, made here so that Ray takes it along instead of looking for this module."""
    from workers.worker import MergeWorker

    class MortalWorker(MergeWorker):
        """Dies when it merges the poisoned job."""

        def run_unit(self, name, requests):
            if any(request.id == "poisoned" for request in requests):
                threading.Thread(target=self.die_in_the_midst, daemon=True).start()
            return super().run_unit(name, requests)

        def die_in_the_midst(self):
            while self.progress().stages.get("poisoned") in (None, "fetch", "plan"):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

    return MortalWorker


class Watch:
    """How long units with a job ran, by job: from their start to what the driver says of their end."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self.begun = {}
        self.lost = []

    def __call__(self, event):
        now = time.monotonic()
        if isinstance(event, UnitStarted):
            self.begun |= dict.fromkeys(event.job_ids, now)
        elif isinstance(event, JobSettled):
            self.seconds[event.job_id] += now - self.begun.pop(event.job_id)
        elif isinstance(event, WorkerReplaced):
            self.lost.append(event)
        raise OSError("the terminal is gone")  # no fault of the display reaches the driver


def test_a_poisoned_and_a_bombed_job_cost_twenty_good_ones_nothing(session, requests, tmp_path):
    # A machine that others keep busy takes as much longer for the same work.
    others = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    watch = Watch()
    crew = Crew(num_workers=2, device="cpu", num_threads=1)
    pool = WorkerPool(
        RayActors(
            mortal_worker(),
            lambda crew: (worker_settings(session, device=crew.device, num_threads=crew.num_threads),),
        ),
        (crew,),
        ping_seconds=0.2,
        unresponsive_seconds=session.unresponsive_seconds,
    )
    with contextlib.closing(JobStore(session.store)) as store, contextlib.closing(pool):
        store.submit(requests)
        driver = Driver(store, pool, session, FleetMetrics(), owner="driver", listener=watch)
        summary = driver.run(drain=True)
        records = {record.id: record for record in store.jobs()}
        events = {name: store.events(name) for name in records}

    assert summary.published == len(GOOD)
    assert {records[name].state for name in GOOD} == {JobState.PUBLISHED}
    assert {(records[name].attempts, records[name].worker_losses) for name in GOOD} == {(1, 0)}
    for name in GOOD:
        verify_release(records[name].release.location, tmp_path / "verify")

    poisoned = records["poisoned"]
    assert (poisoned.state, poisoned.failure_class) == (JobState.QUARANTINED, FailureClass.WORKER_LOST)
    assert (poisoned.attempts, poisoned.worker_losses) == (2, 2)
    assert "2 workers were lost while it ran alone" in poisoned.failure_message
    told = [event.detail for event in events["poisoned"] if "failure" in event.detail]
    assert [detail["worker_lost"] for detail in told] == [False, True, True]

    assert records["bombed"].state in (JobState.FAILED, JobState.QUARANTINED)
    for name in ("poisoned", "bombed"):
        assert watch.seconds[name] < MAX_WORK_SECONDS * others, (name, others)
    # The neighbours of each were told why they ran alone, and nothing else happened to them.
    beside = {name for event in watch.lost for name in event.job_ids} & set(GOOD)
    assert beside
    for name in beside:
        told = [event.detail for event in events[name] if "failure" in event.detail]
        assert [detail["reason"] for detail in told] == ["its unit failed as a whole: not charged, runs alone next"]
