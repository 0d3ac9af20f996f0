"""Servers that real clients talk to, started once for all tests, and an environment free of this machine's settings."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cluster.ray_fleet.session import Session, close_session, open_session
from cluster.settings import Settings
from tests.servers.hub import Hub, serve_hub
from tests.servers.postgres import PostgresServer, serve_postgres
from tests.servers.s3 import S3Server, serve_s3

# One commit gets one answer, however often it is tested; `make fuzz` is for looking further.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("repeatable")

# huggingface_hub reads these variables once, when it is imported, which the first conftest below this one may do.
_home = tempfile.TemporaryDirectory(prefix="mergefleet-tests-")
os.environ["HF_HOME"] = _home.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for _name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)


def pytest_unconfigure() -> None:
    _home.cleanup()


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Have collections pass over what earlier modules left: the engine collects often, in processes that hold little.

    Thousands of tests and all that they import are looked through each time otherwise.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running SeaweedFS. Mark tests that use it with `s3`."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, and an environment that leads every client there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running Postgres. Mark tests that use it with `postgres`."""
    with serve_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a ledger without jobs, of SQLite not there yet: a test with it runs on both kinds of stores."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/ledger/jobs.db"
        return
    with request.getfixturevalue("postgres_server").ledger() as url:
        yield url


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A running loopback Hub."""
    with serve_hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, without faults, and an environment that leads every client there."""
    hub_server.faults.clear()
    for name, value in hub_server.environment().items():
        monkeypatch.setenv(name, value)
    return hub_server


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Session]:
    """A local Ray, as `mergefleet run` starts it. Mark tests that use it with `ray`."""
    home = Path(_home.name)  # one for all: Ray reads the token that lies there once
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="mf-", ignore_cleanup_errors=True) as short,
    ):
        patch.setenv("HOME", str(home))
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        settings = Settings(home=home, ray_directory=short)
        yield open_session(settings, namespace="test", address=None, log_format="json")
        close_session()
