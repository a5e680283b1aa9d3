"""The workers that are there; queues are named for what their workers have."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_list = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("queues", _list, nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_workers"),
    )
    op.create_index("ix_jobs_queue_finished_at", "jobs", ["queue", "finished_at"])
    _rename("default", "cpu")


def downgrade() -> None:
    _rename("cpu", "default")
    op.drop_index("ix_jobs_queue_finished_at", "jobs")
    op.drop_table("workers")


def _rename(old: str, new: str) -> None:
    for table in ("jobs", "outbox"):
        op.execute(sa.text(f"UPDATE {table} SET queue = :new WHERE queue = :old").bindparams(new=new, old=old))  # noqa: S608
