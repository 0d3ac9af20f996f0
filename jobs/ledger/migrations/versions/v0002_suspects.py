"""Jobs that may have ended a unit: suspects, and losses that were charged to no job."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns."""
    op.execute("ALTER TABLE jobs ADD COLUMN suspect BOOLEAN DEFAULT false NOT NULL")
    op.execute("ALTER TABLE jobs ADD COLUMN excused_losses INTEGER DEFAULT 0 NOT NULL")
    op.execute("UPDATE jobs SET suspect = true WHERE worker_losses > 0 OR failure_class IN ('worker_lost', 'internal')")
