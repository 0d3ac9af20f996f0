"""The ledger: a durable queue of jobs with leases and fencing tokens, and the log of everything that happened to them.

Every method is one transaction, so the ledger holds all of a step or nothing of it, whichever process dies. SQLite has
one writer at a time; Postgres locks rows, and drivers that claim at the same moment skip each other's.
"""

import contextlib
from collections.abc import Callable

from jobs.ledger.approvals import Approvals
from jobs.ledger.attempts import Attempts
from jobs.ledger.database import Database
from jobs.ledger.deliveries import Deliveries
from jobs.ledger.paging import Paging
from jobs.ledger.pauses import Pauses
from jobs.ledger.queries import Queries
from jobs.ledger.queue import JobQueue
from jobs.ledger.schema import SCHEMA
from jobs.ledger.stages import Stages
from jobs.ledger.upkeep import Upkeep


class JobStore(JobQueue, Stages, Attempts, Approvals, Pauses, Queries, Paging, Deliveries, Upkeep):
    """The ledger behind a URL. Safe for several threads; other processes and machines open their own.

    Raises, from every method: TransientIOError when the database does not answer, NoCapacityError when its disk is
    full. Nothing was written then. BadInputError when it is damaged, or its file was moved or replaced.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` (on a disk of this machine: WAL does not work over a
            network) or `postgresql://user@host/name`.
        clock: seconds since 1970; None for the database's own, which all drivers share.
        create: whether a ledger that is missing is made.

    Raises:
        BadInputError: the URL is of no known kind, what it names is no ledger, or it is one of another schema.
        NotFoundError: there is no ledger, and none is to be made.
    """

    def __init__(self, url: str, clock: Callable[[], float] | None = None, *, create: bool = True) -> None:
        self._database = Database(url, clock, create=create)

    def one_driver(self, who: str) -> contextlib.AbstractContextManager[None]:
        """Be the only driver while this lasts, where the ledger takes one alone (SQLite); ends with the process.

        Args:
            who: names this driver to the next one.

        Raises:
            BadInputError: it has one already.
        """
        return self._database.one_driver(who)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()


def upgrade_store(url: str) -> tuple[str, str]:
    """Bring the tables of a ledger up to this version; no driver may be at work on it.

    Returns:
        The schema it had, and the one it has.

    Raises:
        BadInputError: it is no ledger, or one of a newer version.
        NotFoundError: there is none.
    """
    database = Database(url, create=False, upgrade=True)
    database.close()
    return database.was_schema, SCHEMA
