"""What a queue is steered by: batches, pauses, shares, deadlines; where attempts ran; the drivers."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ROWS = 1000


def upgrade() -> None:
    """Add tables and columns; jobs that were there already are the batch `earlier`."""
    op.create_table(
        "batches",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "pauses",
        sa.Column("scope", sa.String(10), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("cause", sa.String(10), primary_key=True),
        sa.Column("since", sa.Double, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("failure_class", sa.String(20)),
        sa.Column("state", sa.String(20)),
        sa.Column("probe_at", sa.Double),
        sa.Column("probe", sa.Text),
        sa.Column("num_faults", sa.Integer, nullable=False),
    )
    op.create_table(
        "shares",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("virtual_time", sa.Double, nullable=False),
    )
    op.create_table(
        "options",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "drivers",
        sa.Column("owner", sa.String(256), primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
    )
    for column in (
        sa.Column("batch", sa.String(128), nullable=False, server_default=""),
        sa.Column("base", sa.Text, nullable=False, server_default=""),
        sa.Column("share", sa.Text, nullable=False, server_default=""),
        sa.Column("deadline", sa.Double),
        sa.Column("held_by", sa.Text, nullable=False, server_default=""),
        sa.Column("excused_faults", sa.Integer, nullable=False, server_default="0"),
        sa.Column("worker", sa.Text),
        sa.Column("node", sa.Text),
        sa.Column("started_at", sa.Double),
    ):
        op.add_column("jobs", column)
    op.drop_index("jobs_by_turn", "jobs")
    op.create_index("jobs_by_turn", "jobs", ["state", "held_by", "share", sa.text("priority DESC"), "number"])
    op.create_index("jobs_by_batch", "jobs", ["batch", "state"])
    op.create_index("jobs_by_failure", "jobs", ["state", "failure_class"])
    has_deadline = sa.text("deadline IS NOT NULL")
    op.create_index(
        "jobs_by_deadline", "jobs", ["state", "deadline"], sqlite_where=has_deadline, postgresql_where=has_deadline
    )
    # Said by the states that are not live: a new state changes nothing.
    live = sa.text("state NOT IN ('CANCELLED', 'FAILED', 'QUARANTINED')")
    op.drop_index("jobs_one_per_destination", "jobs")
    op.create_index(
        "jobs_one_per_destination", "jobs", ["destination"], unique=True, sqlite_where=live, postgresql_where=live
    )
    # Attempts were counted when a job was claimed; now they are when its work starts.
    op.execute("UPDATE jobs SET attempts = attempts - 1 WHERE state = 'LEASED'")
    _fill(op.get_bind())
    op.drop_table("mergefleet_schema")


def _fill(connection: sa.Connection) -> None:
    """Write the base of each job into its column, and put all jobs into one batch."""
    jobs = sa.table("jobs", *(sa.column(name) for name in ("number", "request", "base", "batch", "created_at")))
    first = connection.scalar(sa.select(sa.func.min(jobs.c.created_at)))
    if first is None:
        return
    batches = sa.table("batches", sa.column("name"), sa.column("created_at"))
    connection.execute(batches.insert().values(name="earlier", created_at=first))
    connection.execute(jobs.update().values(batch="earlier"))
    last = 0
    while True:
        query = (
            sa.select(jobs.c.number, jobs.c.request).where(jobs.c.number > last).order_by(jobs.c.number).limit(_ROWS)
        )
        rows = connection.execute(query).all()
        if not rows:
            return
        connection.execute(
            jobs.update().where(jobs.c.number == sa.bindparam("in_row")).values(base=sa.bindparam("its_base")),
            [{"in_row": row.number, "its_base": json.loads(row.request)["base"]} for row in rows],
        )
        last = rows[-1].number
