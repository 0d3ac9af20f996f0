"""Upkeep of the ledger: its drivers, what they agree on, and what is old."""

from collections.abc import Sequence

from sqlalchemy import delete, func, insert, or_, select, update

from jobs.errors import NotFoundError
from jobs.ledger.database import Database, in_pieces
from jobs.ledger.options import LABEL_OPTION, read_option, set_option
from jobs.ledger.records import DriverRecord
from jobs.ledger.schema import batches, deliveries, drivers, events, jobs, labels, releases
from jobs.states import FINAL_STATES, JobState


class Upkeep:
    """The side of the ledger that operators and starting drivers use."""

    _database: Database

    def register_driver(self, owner: str, host: str, pid: int, share_label: str) -> None:
        """Note that a driver has begun. Where it makes shares by another label than before, jobs get theirs anew.

        Args:
            owner: names the driver.
            host: its machine.
            pid: its process.
            share_label: the label whose values are the shares.
        """
        with self._database.write() as connection:
            self._database.lock_admission(connection)
            now = self._database.now(connection)
            connection.execute(insert(drivers).values(owner=owner, host=host, pid=pid, started_at=now, seen_at=now))
            if read_option(connection, LABEL_OPTION) == share_label:
                return
            set_option(connection, LABEL_OPTION, share_label)
            value = select(labels.c.value).where(labels.c.job_id == jobs.c.id, labels.c.name == share_label)
            share = func.coalesce(value.scalar_subquery(), "")
            # Those that failed as well: they may be retried.
            connection.execute(update(jobs).where(jobs.c.state != JobState.PUBLISHED).values(share=share))

    def see_driver(self, owner: str, *, ended: bool = False) -> None:
        """Note that a driver is alive, or that it has ended in order."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            values = {"seen_at": now, "ended_at": now} if ended else {"seen_at": now}
            connection.execute(update(drivers).where(drivers.c.owner == owner).values(values))

    def drivers(self) -> tuple[DriverRecord, ...]:
        """Return the drivers that have not ended in order, or hold leases, oldest first."""
        held = (
            select(jobs.c.owner, func.count().label("num_leases"))
            .where(jobs.c.owner.is_not(None))
            .group_by(jobs.c.owner)
            .subquery()
        )
        query = (
            select(drivers, func.coalesce(held.c.num_leases, 0).label("num_leases"))
            .outerjoin(held, held.c.owner == drivers.c.owner)
            .where(or_(drivers.c.ended_at.is_(None), held.c.num_leases > 0))
            .order_by(drivers.c.started_at)
        )
        with self._database.read() as connection:
            return tuple(DriverRecord(**row._asdict()) for row in connection.execute(query))

    def release_leases(self, owner: str) -> int:
        """Let the leases of a driver run out now: others take its jobs, and nothing that it still does counts.

        Returns:
            How many there were.

        Raises:
            NotFoundError: no such driver has worked on this ledger.
        """
        with self._database.write() as connection:
            known = connection.execute(select(drivers.c.owner).where(drivers.c.owner == owner)).first()
            now = self._database.now(connection)
            released = update(jobs).where(jobs.c.owner == owner, jobs.c.lease_expires_at > now)
            count = connection.execute(released.values(lease_expires_at=now)).rowcount
            if known is None and not count:
                raise NotFoundError(
                    f"store {self._database.name} has no driver {owner}; `mergefleet status` lists them"
                )
            return count

    def purge(self, older_than_seconds: float, *, dry_run: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Forget jobs that ended long ago: rows, events, labels and records of releases. Releases stay where they are.

        Messages that were delivered long ago go, too.

        The destination of a published job that is forgotten may be given to another one, which is refused when it
        finds the release there.

        Args:
            older_than_seconds: how long ago they ended, at least.
            dry_run: whether nothing is to be changed.

        Returns:
            Ids of the jobs, and the directories of their reports.
        """
        with self._database.read() if dry_run else self._database.write() as connection:
            if not dry_run:  # no job may be retried, or join an old batch, meanwhile
                self._database.lock_admission(connection)
            limit = self._database.now(connection) - older_than_seconds
            where = (jobs.c.state.in_(FINAL_STATES), jobs.c.updated_at < limit)
            rows = connection.execute(select(jobs.c.id, jobs.c.report_path).where(*where).order_by(jobs.c.number)).all()
            ids: Sequence[str] = [row.id for row in rows]
            if not dry_run:
                for some in in_pieces(ids):
                    for table in (events, labels, releases):
                        connection.execute(delete(table).where(table.c.job_id.in_(some)))
                    connection.execute(delete(jobs).where(jobs.c.id.in_(some)))
                full = select(jobs.c.batch).distinct()
                connection.execute(delete(batches).where(batches.c.name.not_in(full), batches.c.created_at < limit))
                connection.execute(delete(drivers).where(drivers.c.ended_at < limit))
                connection.execute(delete(deliveries).where(deliveries.c.ended_at < limit))
        return tuple(ids), tuple(row.report_path for row in rows if row.report_path is not None)
