"""What a worker writes: it claims a job, keeps it, and says how it ended.

Every write names the attempt that makes it. If another attempt has the job by now, or it has ended, the writer is fenced:
nothing is written, and it is told so. All sessions are those of `Database.write()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from app.artifacts.models import Artifact
from app.integrations import repository as integrations
from app.jobs import events, repository
from app.jobs.events import LogLine
from app.jobs.models import Job, OutboxMessage
from app.jobs.states import ACTIVE, Status
from app.kit.ids import new_id


@dataclass(frozen=True, slots=True)
class NewArtifact:
    """A file that lies in the store by now: its path inside the model's folder, its bytes, its digest."""

    name: str
    size: int
    sha256: str


async def claim(session: AsyncSession, *, queues: Sequence[str], worker: str, lease: timedelta, at: datetime) -> Job | None:
    """Take the best queued job of `queues`, by priority and then age, as its next attempt; None if there is none."""
    job = await repository.best_queued(session, queues)
    if job is None:
        return None
    job.attempt += 1
    job.barren_attempts += 1
    job.worker = worker
    job.lease_expires_at = at + lease
    job.stage = job.progress = None
    events.move(session, job, Status.RUNNING, f"attempt {job.attempt} has begun", at=at)
    return job


async def renew(session: AsyncSession, job_id: str, attempt: int, *, lease: timedelta, at: datetime) -> Status | None:
    """Keep the job for another `lease`. Whether it is running or is to be cancelled; None if fenced."""
    mine = (Job.id == job_id, Job.attempt == attempt, Job.status.in_(ACTIVE))
    status = await session.scalar(update(Job).where(*mine).values(lease_expires_at=at + lease).returning(Job.status))
    return None if status is None else Status(status)


async def record(
    session: AsyncSession,
    job_id: str,
    attempt: int,
    *,
    stage: str | None,
    progress: Mapping[str, Any] | None,
    logs: Sequence[LogLine],
    at: datetime,
) -> bool:
    """Write down how far the attempt is: a new stage, the newest progress `{done, total, unit, eta_seconds}`, log lines.

    False if fenced.
    """
    job = await repository.attempted(session, job_id, attempt)
    if job is None:
        return False
    if stage is not None and stage != job.stage:
        job.stage, job.progress = stage, None
        events.write(session, job, "stage", f"{stage} has begun", at=at, data={"stage": stage})
    for line in logs:
        events.write(session, job, "log", line.message, at=at, level=line.level)
    if progress is not None:
        job.progress = dict(progress)
        told = f"{progress['done']} of {progress['total']} {progress['unit']}"
        events.write(session, job, "progress", told, at=at, data={"stage": job.stage, **progress})
        _count_blocks(job)
    return True


def _count_blocks(job: Job) -> None:
    """An attempt that finishes a block which none before it had finished is worth repeating."""
    if (
        job.stage == "pruning"
        and job.progress
        and job.progress["unit"] == "blocks"
        and job.progress["done"] > job.blocks_done
    ):
        job.blocks_done = job.progress["done"]
        job.barren_attempts = 0


async def succeed(
    session: AsyncSession,
    job_id: str,
    attempt: int,
    *,
    metrics: Mapping[str, Any],
    report: Mapping[str, Any],
    artifacts: Sequence[NewArtifact],
    at: datetime,
) -> bool:
    """End the job with its results. False if fenced, or if it is to be cancelled."""
    job = await repository.attempted(session, job_id, attempt, {Status.RUNNING})
    if job is None:
        return False
    job.metrics, job.report = dict(metrics), dict(report)
    made = {"tenant_id": job.tenant_id, "job_id": job.id, "created_at": at}
    session.add_all(Artifact(id=new_id("art"), **asdict(artifact), **made) for artifact in artifacts)
    await integrations.start(session, job.id, at=at)
    events.move(session, job, Status.SUCCEEDED, "the job has succeeded", at=at)
    return True


async def fail(session: AsyncSession, job_id: str, attempt: int, *, error: Mapping[str, Any], at: datetime) -> bool:
    """End the job with a problem document. False if fenced, or if it is to be cancelled."""
    job = await repository.attempted(session, job_id, attempt, {Status.RUNNING})
    if job is None:
        return False
    job.error = dict(error)
    events.move(session, job, Status.FAILED, str(error["detail"]), at=at, level="error")
    return True


async def confirm_cancelled(session: AsyncSession, job_id: str, attempt: int, *, at: datetime) -> bool:
    """End a job that was to be cancelled, now that nothing of it runs. False if fenced, or if nobody cancelled it."""
    job = await repository.attempted(session, job_id, attempt, {Status.CANCELLING})
    if job is None:
        return False
    events.move(session, job, Status.CANCELLED, "the job is cancelled", at=at)
    return True


async def release(session: AsyncSession, job_id: str, attempt: int, *, at: datetime) -> bool:
    """Give the job back to its queue, because the worker is drained. False if fenced, or if it is to be cancelled."""
    job = await repository.attempted(session, job_id, attempt, {Status.RUNNING})
    if job is None:
        return False
    job.barren_attempts = max(0, job.barren_attempts - 1)
    requeue(session, job, "the worker was told to stop; the job waits for another one", at=at)
    return True


def requeue(session: AsyncSession, job: Job, message: str, *, at: datetime) -> OutboxMessage:
    """Put the job, whose row is locked, back into its queue, and have the doorbell rung."""
    events.move(session, job, Status.QUEUED, message, at=at)
    return announce(session, job, at=at)


def announce(session: AsyncSession, job: Job, *, at: datetime) -> OutboxMessage:
    """Have the doorbell of the job's queue rung, once this transaction is committed."""
    bell = OutboxMessage(id=new_id("out"), queue=job.queue, created_at=at)
    session.add(bell)
    return bell
