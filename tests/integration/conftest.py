"""A worker of this machine, with directories of its own."""

import pytest

from workers.merging.settings import WorkerSettings
from workers.worker import MergeWorker


@pytest.fixture
def settings(tmp_path):
    return WorkerSettings(
        cache=tmp_path / "cache",
        scratch=tmp_path / "scratch",
        reports=tmp_path / "reports",
        device="cpu",
        num_threads=2,
    )


@pytest.fixture
def worker(settings):
    worker = MergeWorker(settings)
    yield worker
    worker.close()
