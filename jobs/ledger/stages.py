"""The stages of an attempt in the ledger: when it begins, and how far it is."""

from collections.abc import Iterable, Mapping

from pydantic import JsonValue
from sqlalchemy import bindparam, update

from jobs.errors import CancelledError, InternalError, MergefleetError
from jobs.ledger.database import Database
from jobs.ledger.journal import Move, Step, make_moves
from jobs.ledger.leases import held_jobs, lock_jobs, lost_lease
from jobs.ledger.records import Beginning, ProgressReport
from jobs.ledger.schema import jobs
from jobs.states import STAGES, JobState


class Stages:
    """The side of the ledger that the holder of a lease writes while the work goes on."""

    _database: Database

    def begin(self, beginnings: Iterable[Beginning]) -> dict[str, MergefleetError]:
        """Start attempts: from now on they count, until it turns out that they were no fault of the job.

        Returns:
            Why attempts were not started, by id: as `advance`.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
        """
        by_id = {each.job_id: each for each in beginnings}
        errors: dict[str, MergefleetError] = {}
        moves = []
        with self._database.write() as connection:
            rows, now = lock_jobs(self._database, connection, by_id)
            for row in rows:
                each = by_id[row.id]
                if lost := lost_lease(row, each.token, now):
                    errors[row.id] = lost
                elif row.state == JobState.CANCELLING:
                    errors[row.id] = CancelledError(f"job '{row.id}': asked to stop before it began")
                else:
                    attempts = row.attempts + 1
                    detail: dict[str, JsonValue] = {
                        "attempt": attempts,
                        "owner": row.owner,
                        "worker": each.worker,
                        "node": each.node,
                    }
                    if each.log is not None:
                        detail["log"] = each.log
                    columns = {
                        "attempts": attempts,
                        "worker": each.worker,
                        "node": each.node,
                        "started_at": now,
                    }
                    moves.append(Move(row, [Step(JobState.PLANNING, detail)], columns))
            make_moves(connection, moves, now)
        return errors

    def advance(
        self,
        leases: Mapping[str, int],
        state: JobState,
        merge_keys: Mapping[str, str | None] | None = None,
        detail: Mapping[str, JsonValue] | None = None,
    ) -> dict[str, MergefleetError]:
        """Move jobs that have begun on to a stage of the work, through those between, each of which is logged.

        Args:
            leases: the token of each job.
            state: MERGING, VERIFYING or PUBLISHING; a job that is there already, or further, stays.
            merge_keys: of the releases to come, by job, when they have become known.
            detail: what there is to say about the state, of all the jobs.

        Returns:
            Why jobs were not moved, by id: LeaseLostError when the token is stale or the lease has expired, so that the
            driver must not write for this job; CancelledError when a user asked to cancel it: stop, then `fail` or
            `let_go`.

        Raises:
            NotFoundError: some ids are no jobs; lists them. Nothing was changed.
            InternalError: the state is no such stage, or a job has not begun.
        """
        if state not in STAGES[1:]:
            raise InternalError(f"expected a stage to advance to after PLANNING, which `begin` leads to, found {state}")
        errors: dict[str, MergefleetError] = {}
        moves = []
        with self._database.write() as connection:
            rows, now = lock_jobs(self._database, connection, leases)
            for row in rows:
                if lost := lost_lease(row, leases[row.id], now):
                    errors[row.id] = lost
                elif row.state == JobState.CANCELLING:
                    errors[row.id] = CancelledError(f"job '{row.id}': asked to stop before {state}")
                elif row.state == JobState.LEASED:
                    raise InternalError(f"job '{row.id}': expected `begin` before it advances to {state}")
                elif steps := STAGES[STAGES.index(JobState(row.state)) + 1 : STAGES.index(state) + 1]:
                    columns = {"merge_key": merge_keys[row.id]} if merge_keys is not None else {}
                    between = [Step(each) for each in steps[:-1]]
                    moves.append(Move(row, [*between, Step(steps[-1], detail or {})], columns))
            make_moves(connection, moves, now)
        return errors

    def report_progress(self, reports: Iterable[ProgressReport]) -> frozenset[str]:
        """Note how far the work on some jobs is; makes no event.

        Args:
            reports: at most one for each job.

        Returns:
            Ids whose lease is lost: expired, taken over, or ended.
        """
        by_id = {report.job_id: report for report in reports}
        if not by_id:
            return frozenset()
        with self._database.write() as connection:
            leases = {job_id: report.token for job_id, report in by_id.items()}
            held, now = held_jobs(self._database, connection, leases)
            rows = [
                {
                    "in_row": number,
                    "stage": by_id[job_id].stage,
                    "bytes_done": by_id[job_id].bytes_done,
                    "bytes_total": by_id[job_id].bytes_total,
                    "updated_at": now,
                }
                for job_id, number in held.items()
            ]
            if rows:
                connection.execute(update(jobs).where(jobs.c.number == bindparam("in_row")), rows)
            return frozenset(by_id) - held.keys()
