"""What is taken away from jobs that have ended: their files, after a time or when they are deleted."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.artifacts.models import Artifact
from app.integrations import repository as integrations
from app.jobs import events, repository
from app.jobs.models import Job
from app.jobs.states import TERMINAL
from secateur.problems import ProblemError

MAX_A_ROUND = 100


async def expire_files(session: AsyncSession, *, at: datetime) -> int:
    """Remove the files of jobs whose time is over; of how many jobs. Their bytes are left to the collection."""
    with_files = select(Artifact.job_id).where(Artifact.job_id == Job.id).exists()
    overdue = select(Job).where(Job.artifacts_expire_at < at, with_files).limit(MAX_A_ROUND)
    jobs = (await session.scalars(overdue.with_for_update(skip_locked=True))).all()
    for job in jobs:
        await _remove_files(session, job)
        events.write(session, job, "log", "the job's files have expired and were removed", at=at)
    return len(jobs)


async def delete_job(session: AsyncSession, tenant_id: str, job_id: str, *, at: datetime) -> list[str]:
    """Leave of a job that has ended only a tombstone: its recipe, its states and its events. The digests of its files.

    Nothing is done if that was done before. Raises `not_found`, and `job_not_finished` for one that has not ended.
    """
    job = await repository.find_locked(session, tenant_id, job_id)
    if job is None:
        raise ProblemError("not_found", f"there is no job {job_id}")
    if job.status not in TERMINAL:
        raise ProblemError("job_not_finished", f"job {job_id} is {job.status}", hint="Cancel it, then delete it.")
    if job.deleted_at is not None:
        return []
    job.deleted_at, job.report = at, None
    events.write(session, job, "log", "the job was deleted", at=at)
    return await _remove_files(session, job)


async def _remove_files(session: AsyncSession, job: Job) -> list[str]:
    await integrations.abandon(session, job.id)
    mine = delete(Artifact).where(Artifact.job_id == job.id).returning(Artifact.sha256)
    return list(await session.scalars(mine))
