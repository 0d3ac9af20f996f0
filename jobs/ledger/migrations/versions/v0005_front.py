"""What those who look on are served from: changes by time, and messages on their way to receivers."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add tables and indexes."""
    op.create_index("events_by_time", "events", ["at", "job_id", "sequence"])
    op.create_table(
        "subscriptions",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("kinds", sa.Text, nullable=False),
        sa.Column("since", sa.Double, nullable=False),
    )
    op.create_table(
        "deliveries",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("webhook", sa.String(128), nullable=False),
        sa.Column("message_id", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("num_tries", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Double),
        sa.Column("ended_at", sa.Double),
        sa.Column("failure", sa.Text),
        sa.UniqueConstraint("webhook", "message_id", name="deliveries_one_per_message"),
    )
    op.create_index("deliveries_by_turn", "deliveries", ["webhook", "due_at"])
