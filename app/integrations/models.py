"""What is to be done with a job's output once it has succeeded, and how that goes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.kit.db import Base


class JobIntegration(Base):
    """One integration of one job. It waits until the job has succeeded, and never changes the job."""

    __tablename__ = "job_integrations"
    __table_args__ = (
        CheckConstraint("status IN ('waiting', 'pending', 'running', 'succeeded', 'failed')", name="status"),
        Index("ix_job_integrations_status_due_at", "status", "due_at"),
    )

    # The table is named and not imported: jobs write these rows.
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Its place in the recipe's list, from 0."""
    name: Mapped[str] = mapped_column(String(40))
    options: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(String(12))
    attempts: Mapped[int] = mapped_column(default=0)
    """How often it was tried, and the fence: named by what is written after a try."""
    round: Mapped[int] = mapped_column(default=0)
    """Tries since it was last asked for; the schedule of pauses goes by this."""
    due_at: Mapped[datetime | None]
    """When it is tried next; while it runs, when its try is given up for lost."""
    url: Mapped[str | None] = mapped_column(String(2000))
    error: Mapped[dict[str, Any] | None]
    """The problem document of the last try that failed."""
    finished_at: Mapped[datetime | None]
