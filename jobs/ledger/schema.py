"""The tables of the ledger. Times are seconds since 1970 on the database's clock; states are names of `JobState`."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

from jobs.states import LIVE_STATES

SCHEMA_VERSION = 2
"""Raised with every change of the tables. A newer store is refused, an older one is brought up to it."""

UPGRADES = {
    1: (
        "ALTER TABLE jobs ADD COLUMN suspect BOOLEAN DEFAULT false NOT NULL",
        "ALTER TABLE jobs ADD COLUMN excused_losses INTEGER DEFAULT 0 NOT NULL",
        "UPDATE jobs SET suspect = true WHERE worker_losses > 0 OR failure_class IN ('worker_lost', 'internal')",
    ),
}
"""By version, the statements that lead to the next: in words that SQLite and Postgres both know."""

metadata = MetaData()

versions = Table(
    "mergefleet_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
)

jobs = Table(
    "jobs",
    metadata,
    # Order of submission. SQLite counts up keys of type INTEGER by itself, and of no other.
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("request", Text, nullable=False),  # JSON of MergeRequest
    Column("destination", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("num_events", Integer, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("worker_losses", Integer, nullable=False, default=0),
    # Losses that were charged to no job, until it is published or retried.
    Column("excused_losses", Integer, nullable=False, default=0),
    # Whether it, or a job beside it, may have ended a unit: until it is published or retried.
    Column("suspect", Boolean, nullable=False, default=False),
    # The lease: set while the state is an active one. The token stays, and only grows.
    Column("owner", Text),
    Column("token", BigInteger, nullable=False, default=0),
    Column("lease_expires_at", Double),
    Column("not_before", Double),  # set in RETRY_WAIT
    Column("merge_key", String(64)),
    # Progress of the attempt at hand.
    Column("stage", Text),
    Column("bytes_done", BigInteger, nullable=False, default=0),
    Column("bytes_total", BigInteger, nullable=False, default=0),
    # The last failure; cleared when the job is published or retried. All failures are in `events`.
    Column("failure_class", String(20)),
    Column("failure_message", Text),
    Column("report_path", Text),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    CheckConstraint("(owner IS NULL) = (lease_expires_at IS NULL)", name="jobs_lease_is_whole"),
)
Index("jobs_by_turn", jobs.c.state, jobs.c.priority.desc(), jobs.c.number)
Index("jobs_by_lease", jobs.c.lease_expires_at)
_is_live = jobs.c.state.in_(sorted(LIVE_STATES))
# The database itself keeps two jobs from writing to one place, even where the code above it errs.
Index(
    "jobs_one_per_destination",
    jobs.c.destination,
    unique=True,
    sqlite_where=_is_live,
    postgresql_where=_is_live,
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey(jobs.c.id), primary_key=True),
    Column("sequence", Integer, primary_key=True),  # 1, 2, 3, … for each job
    Column("at", Double, nullable=False),
    Column("state", String(20), nullable=False),
    Column("detail", Text, nullable=False),  # JSON
)

labels = Table(
    "labels",
    metadata,
    Column("job_id", ForeignKey(jobs.c.id), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
    Index("labels_by_value", "name", "value"),
)

releases = Table(
    "releases",
    metadata,
    Column("job_id", ForeignKey(jobs.c.id), primary_key=True),
    Column("merge_key", String(64), nullable=False),
    Column("release", Text, nullable=False),  # JSON of Release
    Column("settled_at", Double, nullable=False),
    Index("releases_by_merge_key", "merge_key"),
)
