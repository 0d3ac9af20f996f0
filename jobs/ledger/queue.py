"""The queue of the ledger: how jobs come in, are leased, cancelled and queued again."""

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import select, update

from jobs.errors import BadInputError
from jobs.ledger.admission import admit, candidate_of, destination_conflicts
from jobs.ledger.claims import Claim, fail_overdue
from jobs.ledger.clock import follow_clock
from jobs.ledger.database import Database, in_pieces
from jobs.ledger.journal import Step, step_many
from jobs.ledger.leases import lock_many
from jobs.ledger.orphans import queue_orphans
from jobs.ledger.pauses import keep_pauses
from jobs.ledger.records import Lease, SubmitResult
from jobs.ledger.rows import JobRow
from jobs.ledger.schema import jobs
from jobs.ledger.shares import ShareRules
from jobs.request import MergeRequest
from jobs.states import ACTIVE_STATES, RETRYABLE_STATES, WAITING_STATES, JobState

_MAX_ORPHANS = 500
"""Jobs of lost drivers that are queued again in one transaction."""

ONE_SHARE = ShareRules()

_FRESH = {
    "attempts": 0,
    "worker_losses": 0,
    "excused_losses": 0,
    "driver_losses": 0,
    "lost_with": None,
    "excused_faults": 0,
    "suspect": False,
    "not_before": None,
    "held_by": "",
    "approved_by": None,
    "approved_key": None,
    "failure_class": None,
    "failure_message": None,
}
"""Columns of a job that is tried again by a person."""


class JobQueue:
    """The side of the ledger that people submit to and drivers claim from."""

    _database: Database

    def submit(self, requests: Sequence[MergeRequest], batch: str = "default") -> SubmitResult:
        """Make jobs of requests: all or none. Returns when they are on the disk.

        A request that is a job already changes nothing, in any state of that job.

        Args:
            requests: to become jobs.
            batch: that the new jobs join; made when it is missing.

        Raises:
            BadInputError: an id has other content, or a destination belongs to another live or published job; lists
                all such conflicts.
        """
        candidates = [candidate_of(request) for request in requests]
        with self._database.write() as connection:
            self._database.lock_admission(connection)
            return admit(connection, candidates, batch, self._database.now(connection))

    def claim(self, owner: str, limit: int, lease_seconds: float, rules: ShareRules = ONE_SHARE) -> tuple[Lease, ...]:
        """Lease jobs that wait for nothing: shares in turn, inside of each by priority, then by age.

        On the way, jobs of lost drivers are queued again, cancelled ones of theirs become CANCELLED, and jobs whose
        deadline has passed become FAILED.

        Args:
            owner: names the driver, for people.
            limit: most jobs to lease, beside one for each place that is tried again.
            lease_seconds: time until the leases expire, unless they are extended.
            rules: weights and quotas of shares.
        """
        if limit <= 0:
            return ()
        with self._database.write() as connection:
            keep_pauses(connection)
            now = self._database.now(connection)
            follow_clock(connection, now)
            queue_orphans(connection, now, _MAX_ORPHANS)
            fail_overdue(connection, now)
            return Claim(connection, now, owner, limit, rules).lease(now + lease_seconds)

    def extend(self, owner: str, leases: Mapping[str, int], lease_seconds: float) -> frozenset[str]:
        """Let leases expire `lease_seconds` from now.

        Args:
            owner: that claimed them.
            leases: the token of each job.
            lease_seconds: time until they expire.

        Returns:
            Ids whose lease is lost: expired, taken over, or ended.
        """
        held = set()
        with self._database.write() as connection:
            now = self._database.now(connection)
            # One statement for many, which locks and tells at once: a driver keeps thousands.
            extended = (
                update(jobs)
                .where(jobs.c.owner == owner, jobs.c.lease_expires_at > now)
                .values(lease_expires_at=now + lease_seconds)
                .returning(jobs.c.id, jobs.c.token)
            )
            for ids in in_pieces(leases):
                for job_id, token in connection.execute(extended.where(jobs.c.id.in_(ids))):
                    if token == leases[job_id]:
                        held.add(job_id)
        return frozenset(leases) - held

    def cancelling(self, leases: Mapping[str, int]) -> frozenset[str]:
        """Return the ids among these leases that a user asked to cancel."""
        with self._database.read() as connection:
            # Few jobs are ever cancelling at a time, and a driver may hold thousands.
            query = select(jobs.c.id, jobs.c.token).where(jobs.c.state == JobState.CANCELLING)
            return frozenset(row.id for row in connection.execute(query) if row.token == leases.get(row.id))

    def cancel(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Cancel jobs: those that wait, or whose driver is lost, at once; those at work when their driver sees it.

        Returns:
            Ids of the jobs this call changed; not those that are cancelling already, or final.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
        """
        with self._database.write() as connection:
            found, now = lock_many(self._database, connection, ids)
            changed: list[JobRow] = []
            for state, rows in found.items():
                if state in WAITING_STATES:
                    target = JobState.CANCELLED
                elif state in ACTIVE_STATES and state is not JobState.CANCELLING:
                    target = JobState.CANCELLING
                else:
                    continue
                numbers = [row.number for row in rows]
                step_many(connection, numbers, state, Step(target), now, not_before=None, held_by="")
                changed += rows
            queue_orphans(connection, now, _MAX_ORPHANS)
            return tuple(row.id for row in sorted(changed, key=lambda row: row.number))

    def retry(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Queue jobs again that failed, were cancelled or quarantined, or wait for their time; attempts start anew.

        Returns:
            Ids of the jobs this call changed.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
            BadInputError: destinations belong to other live or published jobs by now; lists all. Nothing was changed.
        """
        with self._database.write() as connection:
            self._database.lock_admission(connection)
            found, now = lock_many(self._database, connection, ids, jobs.c.destination)
            rows = [row for state in RETRYABLE_STATES for row in found.get(state, ())]
            rows.sort(key=lambda row: row.number)
            if conflicts := destination_conflicts(connection, ((row.id, row.destination) for row in rows)):
                raise BadInputError("\n".join(conflicts))
            step = Step(JobState.QUEUED, {"reason": "retried"})
            for state in RETRYABLE_STATES & found.keys():
                step_many(connection, [row.number for row in found[state]], state, step, now, **_FRESH)
            return tuple(row.id for row in rows)
