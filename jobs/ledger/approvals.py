"""Releases that wait for a person's word before they are published."""

from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from jobs.errors import BadInputError
from jobs.ledger.database import Database
from jobs.ledger.journal import Step, step_many, take_steps
from jobs.ledger.leases import NO_LEASE, lock_held, lock_many
from jobs.ledger.schema import jobs
from jobs.states import JobState


class Approvals:
    """The side of the ledger on which drivers ask for approval, and people give it or do not."""

    _database: Database

    def await_approval(
        self, job_id: str, token: int, merge_key: str, report_path: str | None, detail: Mapping[str, JsonValue]
    ) -> JobState:
        """End an attempt that was merged and proven, and the lease with it; the job waits for a person.

        Args:
            job_id: of the job.
            token: of the lease.
            merge_key: of the release that can be approved.
            report_path: parity report of the attempt.
            detail: what there is to say about it.

        Returns:
            The state that follows: AWAITING_APPROVAL, or CANCELLED for a job that a user asked to cancel.

        Raises:
            LeaseLostError: the token is stale or the lease has expired.
        """
        with self._database.write() as connection:
            row, now = lock_held(self._database, connection, job_id, token)
            state = JobState.CANCELLED if row.state == JobState.CANCELLING else JobState.AWAITING_APPROVAL
            take_steps(
                connection,
                row,
                now,
                Step(state, {"merge_key": merge_key, **detail}),
                **NO_LEASE,
                merge_key=merge_key,
                report_path=report_path,
                attempts=0,  # it has succeeded: what is left to do has all of them
                approved_by=None,
                approved_key=None,
            )
        return state

    def approve(self, ids: Iterable[str], by: str) -> tuple[str, ...]:
        """Let jobs that wait for it be published: a driver goes on with what was merged.

        Args:
            ids: of the jobs.
            by: who approves them; it is in their manifests.

        Returns:
            Ids of the jobs this call changed; not those that wait for no approval.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
            BadInputError: no one is named.
        """
        return self._answer(ids, by, JobState.QUEUED, {"approved_by": by})

    def reject(self, ids: Iterable[str], by: str, reason: str) -> tuple[str, ...]:
        """Cancel jobs that wait for approval; arguments and errors as for `approve`.

        Args:
            ids: of the jobs.
            by: who rejects them.
            reason: why, for people.
        """
        detail = {"rejected_by": by, "reason": f"rejected by {by}" + (f": {reason}" if reason else "")}
        return self._answer(ids, by, JobState.CANCELLED, detail)

    def _answer(self, ids: Iterable[str], by: str, state: JobState, detail: dict[str, str]) -> tuple[str, ...]:
        if not by.strip() or not by.isprintable():
            raise BadInputError(f"expected the name of the person who decides, found {by!r}")
        columns = {"approved_by": by, "approved_key": jobs.c.merge_key} if state is JobState.QUEUED else {}
        with self._database.write() as connection:
            found, now = lock_many(self._database, connection, ids)
            rows = found.get(JobState.AWAITING_APPROVAL, [])
            numbers = [row.number for row in rows]
            step_many(connection, numbers, JobState.AWAITING_APPROVAL, Step(state, detail), now, **columns)
            return tuple(row.id for row in rows)
