"""Finds the jobs whose worker was lost or whose time is over, and brings them on their way again, or to an end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import claims, events, repository
from app.jobs.models import IdempotencyRecord, Job
from app.jobs.states import Outcome, Status
from secateur.problems import ProblemError


@dataclass(frozen=True, slots=True)
class Reaped:
    """How many jobs were brought where."""

    requeued: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0


async def reap(session: AsyncSession, *, at: datetime, max_barren_attempts: int) -> Reaped:
    """Take every job away from a worker whose lease has run out by `at`, or which has had the job for too long.

    A lost job is queued again, or fails after `max_barren_attempts` attempts in a row without a new block; one that was to
    be cancelled is cancelled. One that has used up its `max_runtime` fails, and one that has not begun by its
    `start_deadline` expires. Idempotency records that are over are deleted on the way.
    """
    ends = [await _end_lost(session, job, at, max_barren_attempts) for job in await repository.lost(session, at)]
    ends += [await _end_overrunning(session, job, at) for job in await repository.overrunning(session, at)]
    ends += [_expire(session, job, at) for job in await repository.late(session, at)]
    await session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.expires_at <= at))
    counted = (Status.QUEUED, Status.FAILED, Status.CANCELLED, Status.EXPIRED)
    return Reaped(*(ends.count(status) for status in counted))


async def _end_lost(session: AsyncSession, job: Job, at: datetime, max_barren_attempts: int) -> Status:
    if job.status == Status.CANCELLING:
        told = "the job is cancelled; its worker was lost"
        return await claims.leave(session, job, Status.CANCELLED, Outcome.LOST, told, at=at)
    if job.barren_attempts < max_barren_attempts:
        told = f"attempt {job.attempt} lost its worker; the job waits for another one"
        return await claims.requeue(session, job, Outcome.LOST, told, at=at)
    told = f"{job.barren_attempts} attempts in a row lost their worker before they had finished a new block"
    hint = "The model may need more memory than the worker has: see the worker's log, then retry the job."
    job.error = ProblemError("worker_lost", told, hint=hint).as_document()
    return await claims.leave(session, job, Status.FAILED, Outcome.LOST, told, at=at, level="error")


async def _end_overrunning(session: AsyncSession, job: Job, at: datetime) -> Status:
    """Its worker finds out by its next heartbeat, as one that lost its lease."""
    told = f"the job has run for its max_runtime of {job.max_runtime_seconds} seconds and was ended"
    hint = "Submit it again with a larger max_runtime, or without one."
    job.error = ProblemError("max_runtime_exceeded", told, hint=hint).as_document()
    return await claims.leave(session, job, Status.FAILED, Outcome.FAILED, told, at=at, level="error")


def _expire(session: AsyncSession, job: Job, at: datetime) -> Status:
    told = "no worker had begun the job by its start_deadline"
    hint = "Retry it when the queue is shorter, or submit it with a later start_deadline."
    job.error = ProblemError("start_deadline_missed", told, hint=hint).as_document()
    events.move(session, job, Status.EXPIRED, told, at=at, level="warning")
    return Status.EXPIRED
