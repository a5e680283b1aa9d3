"""A request with an idempotency key reserves it before it is done."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("idempotency_records") as records:
        records.add_column(sa.Column("holder", sa.String(length=40), nullable=True))
        records.alter_column("status", existing_type=sa.Integer(), nullable=True)


def downgrade() -> None:
    op.execute(sa.text("DELETE FROM idempotency_records WHERE status IS NULL"))
    with op.batch_alter_table("idempotency_records") as records:
        records.alter_column("status", existing_type=sa.Integer(), nullable=False)
        records.drop_column("holder")
