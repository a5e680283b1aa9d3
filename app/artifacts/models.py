"""The files that a job made, and those that it is about to store."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.accounts.models import Tenant
from app.jobs.models import Job
from app.kit.db import Base


class Artifact(Base):
    """One file of a succeeded job. Its bytes lie in the store under `tenant/sha256`."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "name"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id))
    name: Mapped[str] = mapped_column(String(400))
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[datetime]
    lost_at: Mapped[datetime | None]
    """When its bytes were found missing from the store."""


class Upload(Base):
    """A blob that an active job is putting into the store, or has: until the job ends, nobody collects it."""

    __tablename__ = "uploads"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)
    begun_at: Mapped[datetime]
