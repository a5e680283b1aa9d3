"""Finds the jobs whose worker was lost, and brings them on their way again, or to an end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import events, repository
from app.jobs.claims import requeue
from app.jobs.models import IdempotencyRecord, Job
from app.jobs.states import Status
from secateur.problems import ProblemError


@dataclass(frozen=True, slots=True)
class Reaped:
    """How many lost jobs were brought where."""

    requeued: int = 0
    failed: int = 0
    cancelled: int = 0


async def reap(session: AsyncSession, *, at: datetime, max_barren_attempts: int) -> Reaped:
    """Take every job away from a worker whose lease has run out by `at`.

    It is queued again, or fails after `max_barren_attempts` attempts in a row without a new block; one that was to be
    cancelled is cancelled. Idempotency records that are over are deleted on the way.
    """
    ends = [_end(session, job, at, max_barren_attempts) for job in await repository.lost(session, at)]
    await session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.expires_at <= at))
    return Reaped(ends.count(Status.QUEUED), ends.count(Status.FAILED), ends.count(Status.CANCELLED))


def _end(session: AsyncSession, job: Job, at: datetime, max_barren_attempts: int) -> Status:
    if job.status == Status.CANCELLING:
        events.move(session, job, Status.CANCELLED, "the job is cancelled; its worker was lost", at=at)
        return Status.CANCELLED
    if job.barren_attempts >= max_barren_attempts:
        told = f"{job.barren_attempts} attempts in a row lost their worker before they had finished a new block"
        hint = "The model may need more memory than the worker has: see the worker's log, then retry the job."
        job.error = ProblemError("worker_lost", told, hint=hint).as_document()
        events.move(session, job, Status.FAILED, told, at=at, level="error")
        return Status.FAILED
    requeue(session, job, f"attempt {job.attempt} lost its worker; the job waits for another one", at=at)
    return Status.QUEUED
