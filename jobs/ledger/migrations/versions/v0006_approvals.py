"""Who approved a release before it is published."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add columns."""
    op.add_column("jobs", sa.Column("approved_by", sa.Text))
    op.add_column("jobs", sa.Column("approved_key", sa.String(64)))
