"""Files expire, jobs are deleted, and the store is collected."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "uploads",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("begun_at", _moment, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_uploads_job_id_jobs"),
        sa.PrimaryKeyConstraint("job_id", "sha256", name="pk_uploads"),
    )
    op.create_index("ix_uploads_sha256", "uploads", ["sha256"])
    op.add_column("artifacts", sa.Column("lost_at", _moment, nullable=True))
    op.add_column("jobs", sa.Column("artifacts_expire_at", _moment, nullable=True))
    op.add_column("jobs", sa.Column("deleted_at", _moment, nullable=True))
    op.create_index("ix_jobs_artifacts_expire_at", "jobs", ["artifacts_expire_at"])


def downgrade() -> None:
    op.drop_index("ix_jobs_artifacts_expire_at", "jobs")
    op.drop_column("jobs", "deleted_at")
    op.drop_column("jobs", "artifacts_expire_at")
    op.drop_column("artifacts", "lost_at")
    op.drop_table("uploads")
