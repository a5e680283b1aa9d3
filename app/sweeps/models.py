"""A sweep and the jobs that it made."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.accounts.models import Tenant
from app.jobs.models import Job
from app.kit.db import Base


class Sweep(Base):
    __tablename__ = "sweeps"
    __table_args__ = (Index("ix_sweeps_tenant_id_created_at_id", "tenant_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    recipe: Mapped[dict[str, Any]]
    """As accepted: defaults filled, revision resolved."""
    created_at: Mapped[datetime]


class SweepJob(Base):
    """That a job is the sweep's, and its place in the table, from 0."""

    __tablename__ = "sweep_jobs"

    sweep_id: Mapped[str] = mapped_column(ForeignKey(Sweep.id, ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id), unique=True)
