"""What the drivers of one ledger agree on, by name."""

from sqlalchemy import Connection, select

from jobs.ledger.database import put
from jobs.ledger.schema import options

CLOCK_OPTION = "virtual_time"
"""Virtual time of the share that was last given a job."""
LABEL_OPTION = "share_label"
"""The label whose values are the shares."""


def set_option(connection: Connection, name: str, value: str) -> None:
    """Write one option."""
    put(connection, options, {"name": name}, {"value": value})


def read_option(connection: Connection, name: str) -> str:
    """Return one option; nothing where it was never written."""
    return connection.scalar(select(options.c.value).where(options.c.name == name)) or ""
