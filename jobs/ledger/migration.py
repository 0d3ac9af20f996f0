"""The tables of a ledger: made as they stand, or brought up from an older schema by Alembic's migrations."""

from pathlib import Path

from sqlalchemy import Connection, inspect, select

from jobs.errors import BadInputError
from jobs.ledger.schema import SCHEMA, metadata, versions

_BEFORE_ALEMBIC = "mergefleet_schema"
"""Table with the version (1 or 2) of ledgers that were made before migrations were Alembic's."""


def make_tables(connection: Connection) -> None:
    """Make all tables in an empty database."""
    metadata.create_all(connection)
    connection.execute(versions.insert().values(version_num=SCHEMA))


def schema_of(connection: Connection, name: str) -> str | None:
    """Return which schema a database has, or None where it has no ledger yet.

    Args:
        connection: to the database.
        name: of the store, for messages.

    Raises:
        BadInputError: it has tables of another program.
    """
    tables = set(inspect(connection).get_table_names())
    if _BEFORE_ALEMBIC in tables:
        version = connection.exec_driver_sql(f"SELECT max(version) FROM {_BEFORE_ALEMBIC}").scalar()  # noqa: S608
        return None if version is None else f"{version:04}"
    if versions.name in tables and "jobs" in tables:
        found: str | None = connection.scalar(select(versions.c.version_num))
        return found
    if foreign := tables & metadata.tables.keys():
        raise BadInputError(f"store {name} has tables of another program: {', '.join(sorted(foreign))}")
    return None


def upgrade(connection: Connection, found: str) -> None:
    """Bring an older ledger up to the tables as they stand, in the transaction of the connection.

    Args:
        connection: in a transaction that may write, under the admission lock.
        found: the schema it has.
    """
    from alembic import command  # noqa: PLC0415 - needed once in the life of a ledger
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    if _BEFORE_ALEMBIC in inspect(connection).get_table_names():
        command.stamp(config, found)
    command.upgrade(config, SCHEMA)
