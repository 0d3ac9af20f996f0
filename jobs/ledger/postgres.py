"""The ledger on a server: Postgres through psycopg 3, for as many drivers as there are."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import URL, Connection, Engine, Table, create_engine
from sqlalchemy.exc import DBAPIError

from jobs.errors import (
    AuthError,
    MergefleetError,
    NoCapacityError,
    StoreMissingError,
    StoreUnusableError,
    TransientIOError,
)

CLOCK = "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
"""Seconds since 1970, now: not when the transaction began, as now() has it."""

LONGEST_WRITE_SECONDS = 60.0
"""No transaction that writes takes longer: the longest is a submission of 100,000 requests."""

_SERVER_SETTINGS = "-c lock_timeout=10s -c idle_in_transaction_session_timeout=30s -c plan_cache_mode=force_custom_plan"
"""A driver that is frozen inside a transaction must not hold its rows for longer than a lease; and a plan that was made
while there were few jobs must not be kept for many."""

_KINDS: tuple[tuple[str, type[MergefleetError], str], ...] = (
    ("28", AuthError, "refuses this user; check the user, its password and pg_hba.conf"),
    ("3D000", StoreMissingError, "has no such database; create it, or correct its name"),
    ("3F000", StoreUnusableError, "has no such schema; check search_path"),
    ("42501", AuthError, "does not let this user do that; grant it what owns the tables"),
    ("53", NoCapacityError, "has no room or no connections left; nothing was written"),
)
"""Beginnings of SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html), and what they mean here."""


def open_engine(url: URL) -> Engine:
    """Return an engine with a small pool of connections, each tried before it is used again."""
    return create_engine(
        url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url,
        pool_pre_ping=True,
        pool_size=4,
        connect_args={
            "connect_timeout": 10,
            "application_name": "mergefleet",
            "options": _SERVER_SETTINGS,
            # A connection whose other end is gone is told within a minute, not within hours.
            "keepalives_idle": 15,
            "keepalives_interval": 10,
            "keepalives_count": 3,
        },
    )


def reader(engine: Engine) -> Engine:
    """Return the engine for transactions that only read, and see one moment."""
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def is_refusal(cause: BaseException | None) -> bool:
    """Whether the server does not let this user do something."""
    return getattr(cause, "sqlstate", None) == "42501"


def error_of(name: str, cause: BaseException | None) -> MergefleetError:
    """Return our error for one of the server's, or for its silence.

    Args:
        name: of the store, without its password.
        cause: what psycopg raised.
    """
    state = getattr(cause, "sqlstate", None) or ""
    words = " ".join(str(cause).split())
    for begin, kind, what in _KINDS:
        if state.startswith(begin):
            return kind(f"store {name} {what}: {words}")
    # While connecting, psycopg has no SQLSTATE.
    if not state and ("authentication failed" in words or "no pg_hba.conf entry" in words or "no password" in words):
        return AuthError(f"store {name} refuses this user; check the user, its password and pg_hba.conf: {words}")
    if not state and "does not exist" in words:
        return StoreMissingError(f"store {name} has no such database or role; create it, or correct its name: {words}")
    return TransientIOError(f"store {name} does not answer; nothing was written: {words}")


def copy_rows(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows by COPY: 10,000 in a third of the time that as many INSERTs take.

    Args:
        connection: in a transaction.
        table: they go to.
        rows: values by column, of the same columns each; at least one.

    Raises:
        DBAPIError: as `Connection.execute` raises it.
    """
    import psycopg  # noqa: PLC0415 - of an extra

    defaults: dict[str, Any] = {column.name: column.default for column in table.columns if column.default is not None}
    left = {name: default.arg for name, default in defaults.items() if name not in rows[0]}
    names = [*rows[0], *left]
    statement = f"COPY {table.name} ({', '.join(names)}) FROM STDIN"
    try:
        driver: Any = connection.connection.driver_connection
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row([*row.values(), *left.values()])
    except psycopg.Error as error:
        raise DBAPIError.instance(statement, None, error, psycopg.Error, dialect=connection.dialect) from error
