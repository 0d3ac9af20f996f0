"""Losses of drivers, counted apart from other losses: in a row, as a driver that dies without a job acquits it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns; what was excused before stays excused, and counts for nothing."""
    op.add_column("jobs", sa.Column("driver_losses", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("lost_with", sa.Text))
