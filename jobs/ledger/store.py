"""The ledger: a durable queue of jobs with leases and fencing tokens, and the log of everything that happened to them.

Every method is one transaction, so the ledger holds all of a step or nothing of it, whichever process dies. SQLite has
one writer at a time; Postgres locks rows, and drivers that claim at the same moment skip each other's.
"""

from collections.abc import Callable

from jobs.ledger.attempts import Attempts
from jobs.ledger.database import Database
from jobs.ledger.queries import Queries
from jobs.ledger.queue import JobQueue


class JobStore(JobQueue, Attempts, Queries):
    """The ledger behind a URL. Safe for several threads; other processes and machines open their own.

    Raises, from every method: TransientIOError when the database does not answer, NoCapacityError when its disk is
    full. Nothing was written then.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` (on a disk of this machine: WAL does not work over a
            network) or `postgresql://user@host/name`. What is missing is made.
        clock: seconds since 1970; None for the database's own, which all drivers share.

    Raises:
        BadInputError: the URL is of no known kind, what it names is no ledger, or it is one of a newer version.
    """

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        self._database = Database(url, clock)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()
