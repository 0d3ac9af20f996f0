"""Ledgers of older schemas, and places for ledgers on each kind of store."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, make_url, text

import jobs.ledger

MIGRATIONS = Path(jobs.ledger.__file__).with_name("migrations")


MakeUrl = Callable[[], AbstractContextManager[str]]
STORES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(params=STORES)
def open_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """Makes URLs of ledgers that are not there yet, as many as a test wants."""
    return _sqlite_urls(tmp_path) if request.param == "sqlite" else request.getfixturevalue("postgres_server").database


@pytest.fixture(params=STORES)
def lend_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """Lends URLs of ledgers without jobs, as many as a test wants."""
    return _sqlite_urls(tmp_path) if request.param == "sqlite" else request.getfixturevalue("postgres_server").ledger


def _sqlite_urls(directory: Path) -> MakeUrl:
    numbers = itertools.count()
    return lambda: contextlib.nullcontext(f"sqlite:///{directory}/{next(numbers)}/jobs.db")


@pytest.fixture
def new_url(open_url: MakeUrl) -> Iterator[str]:
    """The URL of a ledger that is not there yet."""
    with open_url() as url:
        yield url


def raw_engine(url: str) -> Engine:
    """Return an engine that knows nothing of ledgers."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed.set(drivername="postgresql+psycopg"))
    Path(parsed.database or "").parent.mkdir(parents=True, exist_ok=True)
    return create_engine(parsed)


@contextlib.contextmanager
def raw(url: str) -> Iterator[Connection]:
    """Open a transaction past the ledger."""
    engine = raw_engine(url)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


OLD_JOBS: dict[str, dict[str, Any]] = {
    "queued": {"state": "QUEUED"},
    "leased": {"state": "LEASED", "attempts": 2, "token": 2, "owner": "gone", "lease_expires_at": 5.0},
    "merging": {"state": "MERGING", "attempts": 2, "token": 2, "owner": "gone", "lease_expires_at": 5.0},
    "died": {"state": "RETRY_WAIT", "attempts": 1, "token": 1, "worker_losses": 1, "not_before": 6.0},
    "failed": {"state": "FAILED", "attempts": 5, "token": 5, "failure_class": "internal", "failure_message": "no"},
}
"""Columns, of jobs of older ledgers, that are not as of a new job."""


@pytest.fixture
def make_old() -> Callable[[str, str], None]:
    """Make a ledger of an older schema, with jobs in it, as mergefleet of that time left it."""

    def make(url: str, schema: str) -> None:
        with raw(url) as connection:
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS))
            config.attributes["connection"] = connection
            command.upgrade(config, schema)
            is_alembics = schema >= "0003"
            if is_alembics:
                _insert(connection, "batches", {"name": "earlier", "created_at": 3.0})
            else:
                connection.execute(text("DROP TABLE alembic_version"))
                connection.execute(text("INSERT INTO mergefleet_schema VALUES (:version)"), {"version": int(schema)})
            for number, (name, columns) in enumerate(OLD_JOBS.items(), start=1):
                job = _old_job(name, number) | columns
                if is_alembics:
                    job |= {"batch": "earlier", "base": f"/models/{number}"}
                if is_alembics and name == "leased":
                    job["attempts"] = 1  # since then an attempt counts when it begins
                _insert(connection, "jobs", job)
                event = {"job_id": name, "sequence": 1, "at": 3.0, "state": columns["state"], "detail": "{}"}
                _insert(connection, "events", event)
                _insert(connection, "labels", {"job_id": name, "name": "team", "value": "x"})
            if schema >= "0002":
                connection.execute(text("UPDATE jobs SET suspect = true, excused_losses = 1 WHERE id = 'queued'"))

    return make


def _old_job(name: str, number: int) -> dict[str, Any]:
    places = {"base": f"/models/{number}", "adapter": "/adapters/a", "destination": f"/releases/{name}"}
    return {
        "id": name,
        "request": json.dumps({"schema": 1, "id": name, **places, "labels": {"team": "x"}}),
        "destination": places["destination"],
        "priority": 0,
        "state": "QUEUED",
        "num_events": 1,
        "attempts": 0,
        "worker_losses": 0,
        "token": 0,
        "bytes_done": 0,
        "bytes_total": 0,
        "created_at": 3.0,
        "updated_at": 4.0,
    }


def _insert(connection: Connection, table: str, row: dict[str, Any]) -> None:
    names = ", ".join(row)
    values = ", ".join(f":{name}" for name in row)
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), row)
