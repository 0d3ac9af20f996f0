"""The database under the ledger: opening it, its transactions, its clock. SQLite and Postgres, told apart only here."""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError

from jobs.errors import BadInputError, NoCapacityError, TransientIOError
from jobs.ledger.schema import SCHEMA_VERSION, UPGRADES, metadata, versions

_CLOCKS = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",  # unixepoch('subsec') needs SQLite 3.42
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}
"""The databases that can hold a ledger, and seconds since 1970, now, on the clock of each."""

_BUSY_SECONDS = 10.0
"""How long one writer of SQLite waits for another: a third of a lease, so that a driver that was kept waiting has time
to extend its leases before they run out."""

_ADMISSION_LOCK = 7_236_441
"""Number of the Postgres advisory lock under which jobs are let in: any number that no other program locks."""

_FULL = frozenset({"SQLITE_FULL", "53100"})
"""How SQLite and Postgres say that the disk is full."""

_REFUSED = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")
"""How SQLite says that this process may not use the file, or that it is none."""

_Value = TypeVar("_Value")

_MAX_IN = 500
"""Values in one IN (…); databases bound the parameters of a statement."""


class Database:
    """An open database with the tables of the ledger. Safe for several threads; other processes open their own.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user@host/name`. A missing SQLite file
            is made, with its directory; missing tables are made, and those of an older version brought up to this one.
        clock: seconds since 1970; None for the database's own, which all who share it have.

    Raises:
        BadInputError: the URL is of no known kind, what it names is no ledger, or it is one of a newer version.
        TransientIOError: the database does not answer.
    """

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        parsed = _parse(url)
        self.name = parsed.render_as_string(hide_password=True)
        try:
            self._engine = _sqlite_engine(parsed) if parsed.get_backend_name() == "sqlite" else create_engine(parsed)
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise BadInputError(f"store {self.name}: its driver is not installed ({error})") from error
        except OSError as error:
            raise BadInputError(f"store {self.name}: cannot make its directory: {error}") from error
        self._writer = self._engine.execution_options(writes=True)
        self._own_time = select(text(_CLOCKS[parsed.get_backend_name()]))
        self._clock = clock
        try:
            self._prepare()
        except DatabaseError as error:
            self.close()
            raise BadInputError(f"store {self.name} is not a database of mergefleet: {error.orig}") from error
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that only reads; in SQLite it sees one moment and does not wait.

        Raises:
            TransientIOError: the database does not answer.
        """
        with self._faults(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that may write; committed to disk when the block ends, undone when it raises.

        Raises:
            TransientIOError: the database does not answer, or other writers held it for too long.
            NoCapacityError: its disk is full.
        """
        with self._faults(), self._writer.begin() as connection:
            yield connection

    def lock_admission(self, connection: Connection) -> None:
        """Keep other processes from letting jobs in until the transaction ends. SQLite has one writer anyway."""
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_ADMISSION_LOCK)))

    def now(self, connection: Connection) -> float:
        """Return the time, in seconds since 1970. Ask after taking locks: waiting takes time."""
        return float(connection.execute(self._own_time).scalar_one()) if self._clock is None else self._clock()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            cause = error.orig
            code = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or ""
            if code.startswith(_REFUSED):
                raise BadInputError(f"store {self.name} cannot be opened for writing: {cause}") from error
            if code in _FULL:
                raise NoCapacityError(f"store {self.name}: its disk is full; nothing was written: {cause}") from error
            raise TransientIOError(f"store {self.name} does not answer; nothing was written: {cause}") from error

    def _prepare(self) -> None:
        """Make the tables, or what an older version lacks of them."""
        with self.read() as connection:
            if self._version(connection) == SCHEMA_VERSION:
                return
        with self.write() as connection:
            self.lock_admission(connection)
            found = self._version(connection)
            if found is None:
                metadata.create_all(connection)
                connection.execute(insert(versions).values(version=SCHEMA_VERSION))
                return
            for version in range(found, SCHEMA_VERSION):
                for statement in UPGRADES[version]:
                    connection.exec_driver_sql(statement)
            connection.execute(update(versions).values(version=SCHEMA_VERSION))

    def _version(self, connection: Connection) -> int | None:
        """Return the version of the tables, or None where there are none."""
        tables = set(inspect(connection).get_table_names())
        if versions.name not in tables:
            if foreign := tables & metadata.tables.keys():
                raise BadInputError(f"store {self.name} has tables of another program: {', '.join(sorted(foreign))}")
            return None
        version: int | None = connection.scalar(select(func.max(versions.c.version)))
        if version != SCHEMA_VERSION and version not in UPGRADES:
            raise BadInputError(
                f"store {self.name}: expected schema {SCHEMA_VERSION}, found {version}; "
                "open it with the mergefleet that wrote it, or a newer one"
            )
        return version


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    is_file = parsed is not None and parsed.database not in (None, "", ":memory:")
    if parsed is None or parsed.get_backend_name() not in _CLOCKS or not is_file:
        # The URL itself may hold a password: only its kind is shown.
        found = url.partition(":")[0]
        raise BadInputError(f"expected a store such as sqlite:///jobs.db or postgresql://host/name, found {found!r}:…")
    return parsed


def _sqlite_engine(url: URL) -> Engine:
    """Return an engine for a file in WAL mode whose commits are on the disk when they return."""
    path = Path(str(url.database)).absolute()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Requests and failures are for those who run the fleet. SQLite gives its other files the mode of this one.
    # What is there keeps its own, and what cannot be made SQLite has words for.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    engine = create_engine(url.set(database=str(path)), connect_args={"timeout": _BUSY_SECONDS})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # Python's sqlite3 begins no transactions: `_begin_sqlite` does
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # SQLite does not wait for other openers of a new file here: the timeout of the connection does not count.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction; one that writes takes its lock at once, as a later upgrade could not be waited for."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def rows_where_in(
    connection: Connection, query: Select[*tuple[Any, ...]], column: ColumnElement[Any], values: Iterable[str]
) -> list[Row[*tuple[Any, ...]]]:
    """Return the rows of a query where a column has one of many values."""
    return [row for some in batches(dict.fromkeys(values)) for row in connection.execute(query.where(column.in_(some)))]


def batches(values: Iterable[_Value]) -> Iterator[list[_Value]]:
    """Yield many values in pieces that any database takes in one statement."""
    left = list(values)
    for start in range(0, len(left), _MAX_IN):
        yield left[start : start + _MAX_IN]
