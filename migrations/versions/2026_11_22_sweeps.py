"""Sweeps and their jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_document = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=40), nullable=False),
        sa.Column("recipe", _document, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_sweeps_tenant_id_tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_sweeps"),
    )
    op.create_index("ix_sweeps_tenant_id_created_at_id", "sweeps", ["tenant_id", "created_at", "id"])
    op.create_table(
        "sweep_jobs",
        sa.Column("sweep_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name="fk_sweep_jobs_sweep_id_sweeps", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_sweep_jobs_job_id_jobs"),
        sa.PrimaryKeyConstraint("sweep_id", "position", name="pk_sweep_jobs"),
        sa.UniqueConstraint("job_id", name="uq_sweep_jobs_job_id"),
    )


def downgrade() -> None:
    op.drop_table("sweep_jobs")
    op.drop_table("sweeps")
