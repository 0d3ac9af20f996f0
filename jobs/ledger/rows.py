"""What the rows of the ledger's tables hold, as values."""

import json
from typing import Any, TypeAlias

from sqlalchemy import Row

from jobs.errors import FailureClass
from jobs.ledger.records import Approval, Event, JobRecord, Lease
from jobs.release import Release
from jobs.request import MergeRequest
from jobs.states import JobState

JobRow: TypeAlias = Row[*tuple[Any, ...]]
"""One row of the table of jobs; records also need `release`, of the table of releases."""


def lease_of(row: JobRow, request: MergeRequest, token: int) -> Lease:
    """Return the lease that a claim of this row gives, whose request has been read."""
    return Lease(
        job_id=row.id,
        request=request,
        token=token,
        attempts=row.attempts + 1,
        worker_losses=row.worker_losses,
        excused_losses=row.excused_losses,
        driver_losses=row.driver_losses,
        excused_faults=row.excused_faults,
        suspect=row.suspect,
        share=row.share,
        approval=_approval_of(row),
    )


def request_of(row: JobRow) -> MergeRequest:
    """Return the request a row holds."""
    return MergeRequest.model_validate_json(row.request)


def record_of(row: JobRow) -> JobRecord:
    """Return a job as it stands."""
    return JobRecord(
        id=row.id,
        request=request_of(row),
        batch=row.batch,
        share=row.share,
        state=JobState(row.state),
        held_by=row.held_by,
        attempts=row.attempts,
        worker_losses=row.worker_losses,
        owner=row.owner,
        token=row.token,
        lease_expires_at=row.lease_expires_at,
        not_before=row.not_before,
        merge_key=row.merge_key,
        worker=row.worker,
        node=row.node,
        started_at=row.started_at,
        stage=row.stage,
        bytes_done=row.bytes_done,
        bytes_total=row.bytes_total,
        failure_class=None if row.failure_class is None else FailureClass(row.failure_class),
        failure_message=row.failure_message,
        approval=_approval_of(row),
        release=None if row.release is None else Release.model_validate_json(row.release),
        report_path=row.report_path,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _approval_of(row: JobRow) -> Approval | None:
    return None if row.approved_by is None else Approval(by=row.approved_by, merge_key=row.approved_key)


def event_of(row: JobRow) -> Event:
    """Return one row of the table of events."""
    return Event(
        job_id=row.job_id, sequence=row.sequence, at=row.at, state=JobState(row.state), detail=json.loads(row.detail)
    )
