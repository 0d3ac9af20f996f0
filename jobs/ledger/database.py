"""The database under the ledger: opening it, its transactions, its clock. SQLite and Postgres, told apart only here."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import URL, ColumnElement, Connection, Row, Select, Table, func, insert, make_url, select, text
from sqlalchemy.dialects import postgresql as postgresql_dialect
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    NotSupportedError,
    ProgrammingError,
)

from jobs.errors import BadInputError, MergefleetError, NotFoundError, StoreUnusableError
from jobs.ledger import postgres, sqlite
from jobs.ledger.migration import make_tables, schema_of, upgrade
from jobs.ledger.schema import SCHEMA
from jobs.ledger.sqlite import SqliteFile

_CLOCKS = {"sqlite": sqlite.CLOCK, "postgresql": postgres.CLOCK}
"""The databases that can hold a ledger, and seconds since 1970, now, on the clock of each."""

_INSERTS: Mapping[str, Callable[[Table], Any]] = {
    "sqlite": sqlite_dialect.insert,
    "postgresql": postgresql_dialect.insert,
}

_ADMISSION_LOCK = 7_236_441
"""Number of the Postgres advisory lock under which jobs are let in: any number that no other program locks."""

_EXTRA = "install it with `pip install 'mergefleet[postgres]'`"

_Value = TypeVar("_Value")

_MAX_IN = 500
"""Values in one IN (…); databases bound the parameters of a statement."""


class Database:
    """An open database with the tables of the ledger. Safe for several threads; other processes open their own.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user@host/name`.
        clock: seconds since 1970; None for the database's own, which all who share it have.
        create: whether a missing ledger is made. One of an older schema is brought up by `upgrade` alone.

    Raises:
        BadInputError: the URL is of no known kind, what it names is no ledger, is damaged, or has another schema.
        NotFoundError: there is none, and none is to be made.
        AuthError, TransientIOError: the server does not let this user in, or does not answer.
    """

    def __init__(
        self,
        url: str,
        clock: Callable[[], float] | None = None,
        *,
        create: bool = True,
        upgrade: bool = False,
    ) -> None:
        parsed = _parse(url)
        # libpq takes passwords in the query, too.
        secret = [key for key in parsed.query if "password" in key]
        self.name = parsed.difference_update_query(secret).render_as_string(hide_password=True)
        self._was_open = False
        self._file = SqliteFile(parsed) if parsed.get_backend_name() == "sqlite" else None
        try:
            self._engine = postgres.open_engine(parsed) if self._file is None else self._file.open(create=create)
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise BadInputError(f"store {self.name}: its driver is not installed ({error}); {_EXTRA}") from error
        self._writer = self._engine.execution_options(writes=True)
        self._reader = self._engine if self._file is not None else postgres.reader(self._engine)
        self.settling_seconds = 0.0 if self._file is not None else postgres.LONGEST_WRITE_SECONDS
        """How long after its time, which a transaction asks for on its way, what it writes may appear to others."""
        self._own_time = select(text(_CLOCKS[parsed.get_backend_name()]))
        self._clock = clock
        try:
            self.was_schema = self._prepare(create=create, may_upgrade=upgrade)
        except BaseException:
            self.close()
            raise
        self._was_open = True

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that only reads: all of it sees one moment, and it does not wait.

        Raises:
            TransientIOError: the database does not answer.
            BadInputError: it is damaged, or its file was moved.
        """
        with self._faults(), self._reader.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that may write; committed to disk when the block ends, undone when it raises.

        Raises:
            TransientIOError: the database does not answer, or other writers held it for too long.
            NoCapacityError: its disk is full.
            BadInputError: it is damaged, or its file was moved.
        """
        with self._faults(), self._writer.begin() as connection:
            yield connection

    def one_driver(self, who: str) -> contextlib.AbstractContextManager[None]:
        """Be the only driver while this lasts, where the database takes one alone.

        Raises:
            BadInputError: it has one already.
        """
        return contextlib.nullcontext() if self._file is None else self._file.one_driver(who)

    def lock_admission(self, connection: Connection) -> None:
        """Keep other processes from letting jobs in until the transaction ends. SQLite has one writer anyway."""
        if self._file is None:
            connection.execute(select(func.pg_advisory_xact_lock(_ADMISSION_LOCK)))

    def now(self, connection: Connection) -> float:
        """Return the time, in seconds since 1970. Ask after taking locks: waiting takes time."""
        return float(connection.execute(self._own_time).scalar_one()) if self._clock is None else self._clock()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        if self._file is not None:
            self._file.check_in_place()
        try:
            yield
        except DBAPIError as error:
            # A broken constraint or a wrong statement is a fault of ours, and stays what it is.
            if isinstance(error, IntegrityError | DataError | NotSupportedError):
                raise
            if isinstance(error, ProgrammingError) and not postgres.is_refusal(error.orig):
                if error.statement is not None:
                    raise
                raise StoreUnusableError(
                    f"store {self.name}: it cannot be connected to as its URL says: {error.orig}"
                ) from error
            raise self._error_of(error) from error

    def _error_of(self, error: DBAPIError) -> MergefleetError:
        if self._file is None:
            return postgres.error_of(self.name, error.orig)
        return self._file.error_of(error.orig, was_open=self._was_open)

    def _prepare(self, *, create: bool, may_upgrade: bool) -> str:
        """Make the tables where there are none, or bring them up where that is allowed; return the schema found."""
        with self.read() as connection:
            found = schema_of(connection, self.name)
        if found == SCHEMA:
            return found
        if found is None and not create:
            raise NotFoundError(f"store {self.name} has no ledger yet; `mergefleet submit` makes one")
        if found is not None and (found > SCHEMA or not may_upgrade):
            self._refuse(found)
        with self.write() as connection:
            self.lock_admission(connection)
            found = schema_of(connection, self.name)
            if found is None:
                make_tables(connection)
            elif found != SCHEMA:
                upgrade(connection, found)
        return found or SCHEMA

    def _refuse(self, found: str) -> None:
        if found > SCHEMA:
            do = "open it with the mergefleet that wrote it, or a newer one"
        else:
            do = "stop its drivers, back it up, and run `mergefleet store upgrade`"
        raise BadInputError(f"store {self.name}: expected schema {SCHEMA}, found {found}; {do}")


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


def put(connection: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write one row: a new one, or over the one with this key, which another process may be writing just now."""
    row = _INSERTS[connection.dialect.name](table).values(**key, **values)
    connection.execute(row.on_conflict_do_update(index_elements=list(key), set_=dict(values)))


def insert_many(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert very many rows.

    Args:
        connection: in a transaction.
        table: they go to.
        rows: values by column, of the same columns each.
    """
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        postgres.copy_rows(connection, table, rows)
    else:
        connection.execute(insert(table), rows)


def rows_where_in(
    connection: Connection, query: Select[*tuple[Any, ...]], column: ColumnElement[Any], values: Iterable[str]
) -> list[Row[*tuple[Any, ...]]]:
    """Return the rows of a query where a column has one of many values."""
    return [
        row for some in in_pieces(dict.fromkeys(values)) for row in connection.execute(query.where(column.in_(some)))
    ]


def in_pieces(values: Iterable[_Value]) -> Iterator[list[_Value]]:
    """Yield many values in pieces that any database takes in one statement."""
    left = list(values)
    for start in range(0, len(left), _MAX_IN):
        yield left[start : start + _MAX_IN]
