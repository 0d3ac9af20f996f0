"""Requests, request files, releases and stores for the tests of the ledger."""

import pickle
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from jobs.errors import FailureClass
from jobs.ledger.records import JobRecord, Lease
from jobs.ledger.schema import jobs, pauses
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.locations import LocalPath
from jobs.parity_report import ParitySummary
from jobs.release import Artifact, Manifest, Release
from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from jobs.request_files.problems import RequestFileError
from jobs.request_files.reading import load_requests
from jobs.states import Decision, JobState
from tests.releases import advance, begin

STAGES = (JobState.PLANNING, JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING)


@pytest.fixture(scope="session")
def make_request() -> Callable[..., MergeRequest]:
    def make(name: str, **fields: Any) -> MergeRequest:
        places = {"base": "/models/base", "adapter": f"/adapters/{name}", "destination": f"/releases/{name}"}
        return MergeRequest(id=name, **places | fields)

    return make


@pytest.fixture(scope="session")
def make_release() -> Callable[[str], Release]:
    def make(name: str) -> Release:
        manifest = Manifest(
            merge_key="a" * 64,
            request_id=name,
            base="/models/base",
            base_digest="b" * 64,
            adapter=f"/adapters/{name}",
            adapter_digest="c" * 64,
            base_quantization=BaseQuantization.NF4,
            quantization_options=QuantizationOptions(),
            dtype=None,
            parity=ParitySummary(
                level="arithmetic",
                num_tensors=2,
                num_changed_tensors=1,
                rounding_excess=0.5,
                min_survival=1.0,
                mean_kl=None,
                top1_agreement=None,
            ),
            files=(Artifact(path="model.safetensors", num_bytes=10, sha256="d" * 64),),
            versions={"torch": "2.13.0"},
        )
        location = LocalPath(Path(f"/releases/{name}"))
        return Release(location=location, manifest=manifest, manifest_sha256="e" * 64, created=True)

    return make


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "ledger" / "jobs.db"


@pytest.fixture
def store(store_url: str) -> Iterator[JobStore]:
    """An empty ledger, on SQLite and on Postgres."""
    store = JobStore(store_url)
    yield store
    store.close()


@pytest.fixture
def sqlite_store(database: Path) -> Iterator[JobStore]:
    """An empty ledger in a file."""
    store = JobStore(f"sqlite:///{database}")
    yield store
    store.close()


class Driver:
    """Does to the jobs of one store what a driver, or the death of one, would do."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def record(self, job_id: str) -> JobRecord:
        (found,) = self._store.jobs(Selection(ids=[job_id]))
        return found

    def states(self, job_id: str) -> list[JobState]:
        """Return the states a job went through."""
        return [event.state for event in self._store.events(job_id)]

    def claim(self, job_id: str, owner: str = "driver", seconds: float = 60) -> Lease:
        """Claim the job that is expected to be next."""
        (lease,) = self._store.claim(owner, 1, seconds)
        assert lease.job_id == job_id
        return lease

    def begin(self, job_id: str, owner: str = "driver") -> int:
        """Claim the job that is expected to be next, and start work on it; return its token."""
        token = self.claim(job_id, owner).token
        begin(self._store, job_id, token)
        return token

    def expire(self, job_id: str) -> None:
        """Let the lease of a job run out now, rather than wait for it."""
        with self._store._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(lease_expires_at=1))

    def be_due(self, job_id: str) -> None:
        """Let the wait of a job be over now, rather than wait for it."""
        with self._store._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(not_before=1))

    def probe_now(self) -> None:
        """Let the rests of all places at fault be over now, rather than wait for it."""
        with self._store._database.write() as connection:
            connection.execute(update(pauses).where(pauses.c.probe_at.is_not(None)).values(probe_at=1))

    def lead_to(self, job_id: str, state: JobState) -> int:
        """Bring a fresh job into a state; return its token."""
        if state is JobState.QUEUED:
            return 0
        token = self.claim(job_id).token
        for stage in STAGES[: STAGES.index(state) + 1] if state in STAGES else ():
            advance(self._store, job_id, token, stage)
        if state in (JobState.RETRY_WAIT, JobState.FAILED, JobState.QUARANTINED):
            self._store.fail(job_id, token, FailureClass.TRANSIENT_IO, "gone", Decision(state=state))
        if state in (JobState.CANCELLING, JobState.CANCELLED):
            self._store.cancel([job_id])
        if state is JobState.CANCELLED:
            self._store.let_go(job_id, token, "stopped")
        assert self.record(job_id).state is state
        return token


@pytest.fixture
def driver(store: JobStore) -> Driver:
    return Driver(store)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a request file."""

    def write(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return path

    return write


@pytest.fixture
def refuse(write: Callable[[str, str | bytes], Path]) -> Callable[[str, str | bytes], tuple[list[Any], str]]:
    """Load a file that has mistakes; return the line and field of each, and the whole message."""

    def refuse(name: str, text: str | bytes) -> tuple[list[Any], str]:
        path = write(name, text)
        with pytest.raises(RequestFileError) as caught:
            load_requests(path)
        error = caught.value
        assert pickle.loads(pickle.dumps(error)).problems == error.problems
        assert str(error).splitlines() == [str(problem) for problem in error.problems]
        assert all(problem.file == str(path) for problem in error.problems)
        return [(problem.line, problem.field) for problem in error.problems], str(error)

    return refuse
