"""A job, its attempts and events, its doorbell and the record of the request that made it; the workers."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.accounts.models import Tenant
from app.jobs.states import ACTIVE, TERMINAL, Outcome, Status
from app.kit.db import Base


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


_ACTIVE = _one_of("status", sorted(ACTIVE))
_TERMINAL = _one_of("status", sorted(TERMINAL))


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_one_of("status", Status), name="status"),
        CheckConstraint(f"({_ACTIVE}) = (lease_expires_at IS NOT NULL)", name="lease"),
        CheckConstraint(f"({_TERMINAL}) = (finished_at IS NOT NULL)", name="finished"),
        Index("ix_jobs_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
        Index("ix_jobs_queue_finished_at", "queue", "finished_at"),
        Index("ix_jobs_status_queue_priority_created_at", "status", "queue", "priority", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    kind: Mapped[str] = mapped_column(String(20))
    status: Mapped[str] = mapped_column(String(12))
    stage: Mapped[str | None] = mapped_column(String(20))
    recipe: Mapped[dict[str, Any]]
    """As accepted: defaults filled, revision resolved."""
    model: Mapped[str] = mapped_column(String(200))
    method: Mapped[str | None] = mapped_column(String(64))
    repository: Mapped[str | None] = mapped_column(String(200))
    """None if the kind makes no model."""
    labels: Mapped[dict[str, Any]]
    """The recipe's `metadata`, apart so that lists can filter by it."""
    queue: Mapped[str] = mapped_column(String(40))
    priority: Mapped[int] = mapped_column(default=0)
    max_runtime_seconds: Mapped[int | None]
    """All attempts together may run so long."""
    start_by: Mapped[datetime | None]
    """The job expires if its first attempt has not begun by then."""
    retry_of: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))

    attempt: Mapped[int] = mapped_column(default=0)
    """The fencing token: raised by each claim, and named by every write of a worker."""
    barren_attempts: Mapped[int] = mapped_column(default=0)
    """Attempts in a row, this one included, that have finished no new block; a drained one does not count."""
    blocks_done: Mapped[int] = mapped_column(default=0)
    """The most blocks that any attempt has finished."""
    worker: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None]
    stop_by: Mapped[datetime | None]
    """When the attempt that runs has used up `max_runtime_seconds`."""
    outgrown_queue: Mapped[str | None] = mapped_column(String(40))
    """The queue on whose workers the job ran out of memory, before it was moved up."""
    progress: Mapped[dict[str, Any] | None]
    event_seq: Mapped[int] = mapped_column(default=0)
    """The newest event's number; raised under this row's lock."""

    metrics: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    error: Mapped[dict[str, Any] | None]
    """A problem document."""

    artifacts_expire_at: Mapped[datetime | None] = mapped_column(index=True)
    created_at: Mapped[datetime]
    queued_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    """The row is what is left of the job: its files and its report are gone, and no list shows it."""


class Attempt(Base):
    """One worker's try at a job: written by the claim, ended by whatever takes the job from the worker."""

    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint(_one_of("outcome", Outcome), name="outcome"),
        CheckConstraint("(ended_at IS NULL) = (outcome IS NULL)", name="ended"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    worker: Mapped[str] = mapped_column(String(200))
    queue: Mapped[str] = mapped_column(String(40))
    blocks_done: Mapped[int]
    """The job's finished blocks when the attempt ended; before that, when it began."""
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(16))


class Event(Base):
    """What happened to a job; only ever added to. `seq` counts from 1 within a job, without gaps."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    type: Mapped[str] = mapped_column(String(20))
    level: Mapped[str] = mapped_column(String(10))
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Worker(Base):
    """A worker that has answered lately, and the queues that it serves."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    queues: Mapped[list[str]]
    seen_at: Mapped[datetime]


class OutboxMessage(Base):
    """A doorbell to ring: written with the job, rung after the commit, rung again by the relay until `sent_at` is set."""

    __tablename__ = "outbox"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    queue: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime]
    sent_at: Mapped[datetime | None] = mapped_column(index=True)


class IdempotencyRecord(Base):
    """A request with an `Idempotency-Key` that is under way, or its first answer, kept for a day."""

    __tablename__ = "idempotency_records"

    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    holder: Mapped[str | None] = mapped_column(String(40))
    """The one sending of the request that is to be answered, or was."""
    status: Mapped[int | None]
    """None while the request is under way."""
    headers: Mapped[dict[str, Any]]
    body: Mapped[dict[str, Any]]
    expires_at: Mapped[datetime] = mapped_column(index=True)
