"""The log of a job: the only place where its state changes, and where what happened to it is written down.

Whoever calls these holds the lock of the job's row: it was made, or read `FOR UPDATE`, in the same transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.models import Event, Job
from app.jobs.states import TERMINAL, Status, sources_of
from app.kit.db import storable
from app.kit.ids import new_id
from app.webhooks import messages
from secateur.schemas.events import EventType, Level

MAX_MESSAGE = 4_000


@dataclass(frozen=True, slots=True)
class LogLine:
    """Something that a run has to say."""

    level: Level
    message: str


def write(
    session: AsyncSession,
    job: Job,
    type_: EventType,
    message: str,
    *,
    at: datetime,
    level: Level = "info",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Add the next event to the job's log."""
    job.event_seq += 1
    session.add(
        Event(
            job_id=job.id,
            seq=job.event_seq,
            id=new_id("evt"),
            type=type_,
            level=level,
            message=storable(message)[:MAX_MESSAGE],
            data=dict(data or {}),
            created_at=at,
        )
    )


def move(session: AsyncSession, job: Job, status: Status, message: str, *, at: datetime, level: Level = "info") -> None:
    """Bring the job into another state and write that down.

    Raises ValueError if the table of transitions has no such way: the caller has to know where the job stands.
    """
    if job.status not in sources_of(status):
        raise ValueError(f"no way leads from {job.status} to {status}")
    job.status = status
    if status is Status.QUEUED:
        job.queued_at = at
    elif status is Status.RUNNING:
        job.started_at = at
    elif status is Status.CANCELLING:
        job.cancelling_at = at
    if status in TERMINAL:
        job.finished_at = at
    if status in TERMINAL or status is Status.QUEUED:
        job.worker = job.lease_expires_at = job.stop_by = None
    write(session, job, "status", message, at=at, level=level, data={"status": status, "attempt": job.attempt})
    tell(session, job, at=at)


def tell(session: AsyncSession, job: Job, *, at: datetime) -> None:
    """Have the tenant's webhook endpoints told which state the job is in now."""
    messages.write(session, job.tenant_id, f"job.{job.status}", {"object": "job", "id": job.id}, at=at)
