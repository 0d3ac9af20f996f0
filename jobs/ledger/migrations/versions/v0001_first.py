"""The first schema: jobs, events, labels, releases."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_LIVE = (
    "state IN ('CANCELLING', 'LEASED', 'MERGING', 'PLANNING', 'PUBLISHED', 'PUBLISHING', 'QUEUED', 'RETRY_WAIT', "
    "'VERIFYING')"
)


def upgrade() -> None:
    """Make the tables."""
    op.create_table("mergefleet_schema", sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
    op.create_table(
        "jobs",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(128), nullable=False, unique=True),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("destination", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("num_events", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("worker_losses", sa.Integer, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("lease_expires_at", sa.Double),
        sa.Column("not_before", sa.Double),
        sa.Column("merge_key", sa.String(64)),
        sa.Column("stage", sa.Text),
        sa.Column("bytes_done", sa.BigInteger, nullable=False),
        sa.Column("bytes_total", sa.BigInteger, nullable=False),
        sa.Column("failure_class", sa.String(20)),
        sa.Column("failure_message", sa.Text),
        sa.Column("report_path", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.CheckConstraint("(owner IS NULL) = (lease_expires_at IS NULL)", name="jobs_lease_is_whole"),
    )
    op.create_index("jobs_by_turn", "jobs", ["state", sa.text("priority DESC"), "number"])
    op.create_index("jobs_by_lease", "jobs", ["lease_expires_at"])
    op.create_index(
        "jobs_one_per_destination",
        "jobs",
        ["destination"],
        unique=True,
        sqlite_where=sa.text(_LIVE),
        postgresql_where=sa.text(_LIVE),
    )
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(128), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("sequence", sa.Integer, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
    )
    op.create_table(
        "labels",
        sa.Column("job_id", sa.String(128), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_index("labels_by_value", "labels", ["name", "value"])
    op.create_table(
        "releases",
        sa.Column("job_id", sa.String(128), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("merge_key", sa.String(64), nullable=False),
        sa.Column("release", sa.Text, nullable=False),
        sa.Column("settled_at", sa.Double, nullable=False),
    )
    op.create_index("releases_by_merge_key", "releases", ["merge_key"])
