"""Which jobs a question or a command is about."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, or_, select

from jobs.errors import FailureClass
from jobs.ledger.schema import jobs
from jobs.ledger.schema import labels as label_table
from jobs.states import FINAL_STATES, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Jobs that meet all of these; what is not said selects all."""

    ids: Collection[str] | None = None
    """Unknown ones are left out."""
    batch: str | None = None
    states: Collection[JobState] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """Those that have all of these labels."""
    failures: Collection[FailureClass] | None = None
    """Those whose last failure is of one of these classes."""
    since: float | None = None
    """Those that changed at this time or later, seconds since 1970."""
    unfinished_at: float | None = None
    """Those that were not final at this time, or have changed since."""

    def narrow(self, query: Select[*tuple[Any, ...]]) -> Select[*tuple[Any, ...]]:
        """Add everything but the ids, which may be too many for one statement, to a query of jobs."""
        if self.batch is not None:
            query = query.where(jobs.c.batch == self.batch)
        if self.states is not None:
            query = query.where(jobs.c.state.in_(self.states))
        if self.failures is not None:
            query = query.where(jobs.c.failure_class.in_(self.failures))
        if self.since is not None:
            query = query.where(jobs.c.updated_at >= self.since)
        if self.unfinished_at is not None:
            is_open = jobs.c.state.not_in(FINAL_STATES)
            query = query.where(or_(is_open, jobs.c.updated_at >= self.unfinished_at))
        for name, value in self.labels.items():
            has = select(label_table.c.job_id).where(label_table.c.name == name, label_table.c.value == value)
            query = query.where(jobs.c.id.in_(has))
        return query


ALL = Selection()
