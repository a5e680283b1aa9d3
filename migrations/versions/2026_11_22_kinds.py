"""Jobs of a kind without a method, or that make no model."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("method", existing_type=sa.String(length=64), nullable=True)
        jobs.alter_column("repository", existing_type=sa.String(length=200), nullable=True)


def downgrade() -> None:
    """Jobs that the older code cannot show get empty texts, which it shows as they are."""
    jobs = sa.table("jobs", sa.column("method"), sa.column("repository"))
    for column in ("method", "repository"):
        op.execute(jobs.update().where(jobs.c[column].is_(None)).values({column: ""}))
    with op.batch_alter_table("jobs") as table:
        table.alter_column("method", existing_type=sa.String(length=64), nullable=False)
        table.alter_column("repository", existing_type=sa.String(length=200), nullable=False)
