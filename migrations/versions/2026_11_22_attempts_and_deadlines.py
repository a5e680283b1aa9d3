"""Attempts, deadlines, queues by memory; the database itself holds what a job's state implies."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_moment = sa.DateTime(timezone=True)
_CHECKS = {
    "lease": "(status IN ('cancelling', 'running')) = (lease_expires_at IS NOT NULL)",
    "finished": "(status IN ('cancelled', 'expired', 'failed', 'succeeded')) = (finished_at IS NOT NULL)",
}


def upgrade() -> None:
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=False),
        sa.Column("queue", sa.String(length=40), nullable=False),
        sa.Column("blocks_done", sa.Integer(), nullable=False),
        sa.Column("started_at", _moment, nullable=False),
        sa.Column("ended_at", _moment, nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('succeeded', 'failed', 'cancelled', 'lost', 'drained', 'out_of_memory')", name="outcome"
        ),
        sa.CheckConstraint("(ended_at IS NULL) = (outcome IS NULL)", name="ended"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_attempts_job_id_jobs"),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_attempts"),
    )
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("max_runtime_seconds", sa.Integer(), nullable=True))
        jobs.add_column(sa.Column("start_by", _moment, nullable=True))
        jobs.add_column(sa.Column("stop_by", _moment, nullable=True))
        jobs.add_column(sa.Column("outgrown_queue", sa.String(length=40), nullable=True))
        for name, condition in _CHECKS.items():
            jobs.create_check_constraint(op.f(f"ck_jobs_{name}"), condition)


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        for name in _CHECKS:
            jobs.drop_constraint(op.f(f"ck_jobs_{name}"), type_="check")
        for column in ("outgrown_queue", "stop_by", "start_by", "max_runtime_seconds"):
            jobs.drop_column(column)
    op.drop_table("attempts")
