"""The ledger in a file: SQLite with a write-ahead log, for one driver at a time."""

import contextlib
import fcntl
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url

from jobs.errors import BadInputError, MergefleetError, NoCapacityError, StoreUnusableError, TransientIOError

CLOCK = "(julianday('now') - 2440587.5) * 86400.0"
"""Seconds since 1970, now; unixepoch('subsec') needs SQLite 3.42."""

_BUSY_SECONDS = 10.0
"""How long one writer waits for another: a third of a lease, so that a driver that was kept waiting has time to extend
its leases before they run out."""

_REFUSED = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")
"""How SQLite says that this process may not use the file."""

_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")

_RESTORE = "restore it from a backup (docs/operations.md, Backup)"


class SqliteFile:
    """The file of a ledger, and what SQLite says about it."""

    def __init__(self, url: URL) -> None:
        self.path = Path(str(url.database)).absolute()
        self._opened: tuple[int, int] | None = None
        """Device and inode of the file that is open."""

    def open(self, *, create: bool) -> Engine:
        """Return an engine whose commits are on the disk when they return.

        Args:
            create: whether a file that is missing is made, with its directory.

        Raises:
            BadInputError: there is no file, it is empty, or it cannot be made.
        """
        try:
            if not self.path.exists():
                if not create:
                    raise BadInputError(
                        f"store {self.path}: there is no ledger here; `mergefleet submit` makes one, or set "
                        "MERGEFLEET_STORE or MERGEFLEET_HOME to where it is"
                    )
                self._make()
            status = self.path.stat()
        except OSError as error:
            raise BadInputError(f"store {self.path}: it cannot be made or opened: {error.strerror or error}") from error
        if status.st_size == 0:
            raise BadInputError(
                f"store {self.path} is an empty file, which mergefleet never leaves; {_RESTORE}, or delete it to begin "
                "anew"
            )
        self._opened = status.st_dev, status.st_ino
        return _engine(self.path)

    def check_in_place(self) -> None:
        """Check that the file that is open is still the one under this path: else all that is written is lost.

        Raises:
            BadInputError: it was moved, deleted or replaced.
        """
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise StoreUnusableError(
                f"store {self.path} was moved or deleted while it was open; put it back, and start again"
            ) from None
        except OSError:
            return  # SQLite says what is wrong
        if self._opened is not None and (status.st_dev, status.st_ino) != self._opened:
            raise StoreUnusableError(f"store {self.path} was replaced by another file while it was open; start again")

    def error_of(self, cause: BaseException | None, *, was_open: bool) -> MergefleetError:
        """Return our error for one of SQLite's.

        Args:
            cause: what its driver raised.
            was_open: whether the ledger could be used before: what this process was allowed then, it will be again.
        """
        code = getattr(cause, "sqlite_errorname", None) or ""
        if code.startswith(_DAMAGED):
            return StoreUnusableError(f"store {self.path} is damaged, or no ledger at all ({cause}); {_RESTORE}")
        if code.startswith(_REFUSED) and not was_open:
            return StoreUnusableError(f"store {self.path} cannot be opened for writing: {cause}")
        if code == "SQLITE_FULL":
            return NoCapacityError(f"store {self.path}: its disk is full; nothing was written: {cause}")
        if code.startswith("SQLITE_BUSY"):
            return TransientIOError(
                f"store {self.path} is locked by another process that does not go on; nothing was written: {cause}"
            )
        return TransientIOError(f"store {self.path} does not answer; nothing was written: {cause}")

    @contextlib.contextmanager
    def one_driver(self, who: str) -> Iterator[None]:
        """Be the only driver of this ledger while this lasts; the kernel ends it with the process.

        Raises:
            BadInputError: another driver is at work on it.
        """
        lock = self.path.with_name(f"{self.path.name}-driver")
        with lock.open("a+", encoding="utf-8") as file:
            lock.chmod(0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise BadInputError(
                    f"store {self.path} has a driver already: {file.read().strip() or 'of unknown name'}. A ledger in "
                    "SQLite takes one; for several, use one in Postgres (MERGEFLEET_STORE=postgresql://…)"
                ) from None
            file.truncate(0)
            file.write(f"{who}\n")
            file.flush()
            yield

    def _make(self) -> None:
        """Make an empty database under a name of its own, and give it the right one: it is never seen half made."""
        from jobs.ledger.migration import make_tables  # noqa: PLC0415 - it knows the tables, which know no database

        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Requests and failures are for those who run the fleet. SQLite gives its other files the mode of this one.
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}-") as directory:
            made = Path(directory) / self.path.name
            made.touch(mode=0o600)
            engine = create_engine(make_url("sqlite://").set(database=str(made)))
            with engine.begin() as connection:
                make_tables(connection)
            engine.dispose()
            with made.open("rb") as file:
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(made, self.path)
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)


def _engine(path: Path) -> Engine:
    url = make_url("sqlite://").set(database=str(path))
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin)
    return engine


def _set_up(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # Python's sqlite3 begins no transactions: `_begin` does
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


def _begin(connection: Connection) -> None:
    """Begin a transaction; one that writes takes its lock at once, as a later upgrade could not be waited for."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
