"""The states of a job, the transitions between them, and what an error leads to."""

from dataclasses import dataclass
from enum import StrEnum

from jobs.errors import FailureClass


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "QUEUED"
    """Waiting for a driver."""
    LEASED = "LEASED"
    """A driver holds it."""
    PLANNING = "PLANNING"
    """Its headers and configs are being read."""
    MERGING = "MERGING"
    """Merged shards are being written."""
    VERIFYING = "VERIFYING"
    """Parity is being checked."""
    AWAITING_APPROVAL = "AWAITING_APPROVAL"
    """Merged and proven; published once a person has approved it. No driver holds it."""
    PUBLISHING = "PUBLISHING"
    """The release is being made visible."""
    PUBLISHED = "PUBLISHED"
    """The release is visible. Final."""
    RETRY_WAIT = "RETRY_WAIT"
    """Failed in a way worth trying again, and waits for its time."""
    CANCELLING = "CANCELLING"
    """A user asked to stop it while a driver holds it."""
    CANCELLED = "CANCELLED"
    """Stopped on request. Final."""
    FAILED = "FAILED"
    """Failed for good. Final, until a user retries it."""
    QUARANTINED = "QUARANTINED"
    """Alone on them, it has cost workers again and again. Final, until a user retries it."""


ACTIVE_STATES = frozenset(
    {JobState.LEASED, JobState.PLANNING, JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING, JobState.CANCELLING}
)
"""States in which a driver holds a lease."""

STAGES = (JobState.PLANNING, JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING)
"""States a driver moves a job through while it works on it, in order."""

WAITING_STATES = frozenset({JobState.QUEUED, JobState.RETRY_WAIT, JobState.AWAITING_APPROVAL})
"""States of jobs that no driver holds, and that are not final."""

CLAIMABLE_STATES = frozenset({JobState.QUEUED, JobState.RETRY_WAIT})
FINAL_STATES = frozenset({JobState.PUBLISHED, JobState.CANCELLED, JobState.FAILED, JobState.QUARANTINED})
UNSUCCESSFUL_STATES = frozenset({JobState.FAILED, JobState.QUARANTINED})
"""States of jobs that failed for good."""
RETRYABLE_STATES = frozenset({JobState.RETRY_WAIT, JobState.CANCELLED, JobState.FAILED, JobState.QUARANTINED})
"""States that a person's retry leads out of, back to QUEUED."""

LIVE_STATES = frozenset(JobState) - {JobState.CANCELLED, JobState.FAILED, JobState.QUARANTINED}
"""States in which a job has, or may still write, its destination: no other job may be given the same one."""

SUSPICIOUS_FAILURES = frozenset({FailureClass.WORKER_LOST, FailureClass.OUT_OF_MEMORY, FailureClass.INTERNAL})
"""Failures that end a whole unit, whichever of its jobs is at fault. Where there were several, none of them is charged;
each runs alone, and what goes wrong then is its own."""

MAX_EXCUSED_LOSSES = 3
"""How often a job is not charged with the end of an attempt that is more likely the fault of others: of a GPU, or of
jobs beside it. A job that goes on doing so is no victim."""

MAX_DRIVER_LOSSES = 5
"""How many drivers in a row, and none in between without it, may be lost while a job is at work. Drivers that are
killed, drained machines and restarts hit whatever is at work: it takes more than a worker's death to tell."""

_ENDINGS = frozenset(
    {
        JobState.QUEUED,
        JobState.RETRY_WAIT,
        JobState.FAILED,
        JobState.QUARANTINED,
        JobState.CANCELLING,
        JobState.PUBLISHED,
    }
)
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.LEASED, JobState.CANCELLED, JobState.FAILED}),
    JobState.RETRY_WAIT: frozenset({JobState.LEASED, JobState.CANCELLED, JobState.QUEUED, JobState.FAILED}),
    JobState.LEASED: _ENDINGS | {JobState.PLANNING},
    JobState.PLANNING: _ENDINGS | {JobState.MERGING},
    JobState.MERGING: _ENDINGS | {JobState.VERIFYING},
    JobState.VERIFYING: _ENDINGS | {JobState.PUBLISHING, JobState.AWAITING_APPROVAL},
    JobState.AWAITING_APPROVAL: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.PUBLISHING: _ENDINGS,
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.PUBLISHED}),
    JobState.PUBLISHED: frozenset(),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.QUARANTINED: frozenset({JobState.QUEUED}),
}
"""Allowed transitions. What waits for its turn fails when its deadline passes. A lease that expires, or a driver that
lets go of a job, leads back to QUEUED; while CANCELLING every way to end an attempt leads to CANCELLED, except that a
release which is already visible is PUBLISHED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows from a failure: the next state, and how long to wait first (seconds)."""

    state: JobState
    delay_seconds: float = 0.0
    alone: bool = False
    """Whether the job runs in a pass of its own from then on."""
