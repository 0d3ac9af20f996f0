"""The tables of the ledger. Times are seconds since 1970 on the database's clock; states are names of `JobState`.

Every change of a table is also a migration in `jobs/ledger/migrations`; a test compares what both lead to.
"""

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
    UniqueConstraint,
    false,
)

from jobs.states import LIVE_STATES, JobState

SCHEMA = "0006"
"""The last migration; raised with every change of the tables."""

metadata = MetaData()

versions = Table("alembic_version", metadata, Column("version_num", String(32), primary_key=True))
"""Alembic's own table: the last migration of this ledger."""

batches = Table(
    "batches",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("created_at", Double, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    # Order of submission. SQLite counts up keys of type INTEGER by itself, and of no other.
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("request", Text, nullable=False),  # JSON of MergeRequest
    Column("batch", String(128), nullable=False, server_default=""),  # one of `batches`
    Column("base", Text, nullable=False, server_default=""),
    Column("destination", Text, nullable=False),
    Column("share", Text, nullable=False, server_default=""),  # value of the label that shares are made by
    Column("priority", Integer, nullable=False),
    Column("deadline", Double),
    Column("state", String(20), nullable=False),
    # Of a job that waits: the pause that keeps it from being claimed, or nothing.
    Column("held_by", Text, nullable=False, server_default=""),
    Column("num_events", Integer, nullable=False),
    # Attempts that count. One does when its work starts, until it turns out to be no fault of the job.
    Column("attempts", Integer, nullable=False, default=0),
    Column("worker_losses", Integer, nullable=False, default=0),
    # Losses that were charged to no job, until it is published or retried.
    Column("excused_losses", Integer, nullable=False, default=0, server_default="0"),
    # Losses of drivers in a row with it at work, and the last of them; until one is lost without it.
    Column("driver_losses", Integer, nullable=False, default=0, server_default="0"),
    Column("lost_with", Text),
    # Faults of places that no attempt was counted for, until it is published or retried.
    Column("excused_faults", Integer, nullable=False, default=0, server_default="0"),
    # Whether it, or a job beside it, may have ended a unit: until it is published or retried.
    Column("suspect", Boolean, nullable=False, default=False, server_default=false()),
    # The lease: set while the state is an active one. The token stays, and only grows.
    Column("owner", Text),
    Column("token", BigInteger, nullable=False, default=0),
    Column("lease_expires_at", Double),
    Column("not_before", Double),  # set in RETRY_WAIT
    Column("merge_key", String(64)),
    # Who approved which merge key, until the job is retried.
    Column("approved_by", Text),
    Column("approved_key", String(64)),
    # The attempt at hand, or the last one: where and since when, and how far it is.
    Column("worker", Text),
    Column("node", Text),
    Column("started_at", Double),
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
Index("jobs_by_turn", jobs.c.state, jobs.c.held_by, jobs.c.share, jobs.c.priority.desc(), jobs.c.number)
Index("jobs_by_lease", jobs.c.lease_expires_at)
Index("jobs_by_batch", jobs.c.batch, jobs.c.state)
Index("jobs_by_failure", jobs.c.state, jobs.c.failure_class)
Index(
    "jobs_by_deadline",
    jobs.c.state,
    jobs.c.deadline,
    sqlite_where=jobs.c.deadline.is_not(None),
    postgresql_where=jobs.c.deadline.is_not(None),
)
_is_live = jobs.c.state.not_in(sorted(set(JobState) - LIVE_STATES))
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
    Index("events_by_time", "at", "job_id", "sequence"),
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

pauses = Table(
    "pauses",
    metadata,
    Column("scope", String(10), primary_key=True),  # queue, batch, base, place
    Column("name", Text, primary_key=True),  # of the batch, base or place; of the queue nothing
    Column("cause", String(10), primary_key=True),  # operator, fault
    Column("since", Double, nullable=False),
    Column("by", Text, nullable=False),  # who paused it: a person, or a driver
    Column("reason", Text, nullable=False),
    Column("failure_class", String(20)),
    # Of a fault: how far the job was, when one may go ahead to find out, which one did, how often it was met in a row.
    Column("state", String(20)),
    Column("probe_at", Double),
    Column("probe", Text),
    Column("num_faults", Integer, nullable=False),
)

shares = Table(
    "shares",
    metadata,
    Column("name", Text, primary_key=True),
    Column("virtual_time", Double, nullable=False),  # what it was given so far, each job over its weight
)
"""Shares that were given jobs. Their weights and quotas are settings of the drivers."""

options = Table(
    "options",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", Text, nullable=False),
)
"""What drivers agree on: `share_label`, and `virtual_time` of the share that was last given a job."""

drivers = Table(
    "drivers",
    metadata,
    Column("owner", String(256), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Column("ended_at", Double),
)

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("kinds", Text, nullable=False),  # kinds of messages, with commas between
    Column("since", Double, nullable=False),
)
"""Receivers of messages. Their addresses and secrets are settings of the server."""

deliveries = Table(
    "deliveries",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("webhook", String(128), nullable=False),  # one of `subscriptions`
    Column("message_id", String(64), nullable=False),
    Column("body", Text, nullable=False),  # JSON
    Column("created_at", Double, nullable=False),
    Column("num_tries", Integer, nullable=False, default=0),  # that have failed
    Column("due_at", Double),  # until it has ended
    Column("ended_at", Double),
    Column("failure", Text),  # of the last try; of one that has ended, why it was given up
    UniqueConstraint("webhook", "message_id", name="deliveries_one_per_message"),
    Index("deliveries_by_turn", "webhook", "due_at"),
)
