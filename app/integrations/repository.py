"""Every query for the integrations of jobs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.integrations.models import JobIntegration
from secateur.problems import ProblemError
from secateur.recipes import Integration


def add(session: AsyncSession, job_id: str, wanted: Sequence[Integration]) -> None:
    """Have these done once the job has succeeded."""
    session.add_all(
        JobIntegration(job_id=job_id, position=position, name=one.name, options=one.options, status="waiting")
        for position, one in enumerate(wanted)
    )


async def start(session: AsyncSession, job_id: str, *, at: datetime) -> None:
    """The job has succeeded: what waited for that is due."""
    mine = (JobIntegration.job_id == job_id, JobIntegration.status == "waiting")
    await session.execute(update(JobIntegration).where(*mine).values(status="pending", due_at=at))


async def of_jobs(session: AsyncSession, job_ids: Collection[str]) -> Mapping[str, list[JobIntegration]]:
    """The integrations of each of the jobs, in the recipe's order."""
    found: dict[str, list[JobIntegration]] = {job_id: [] for job_id in job_ids}
    query = select(JobIntegration).where(JobIntegration.job_id.in_(job_ids)).order_by(JobIntegration.position)
    for row in await session.scalars(query.execution_options(populate_existing=True)):
        found[row.job_id].append(row)
    return found


async def retry(session: AsyncSession, job_id: str, *, at: datetime) -> None:
    """Try those that have failed, or wait for their next try, again now."""
    mine = (JobIntegration.job_id == job_id, JobIntegration.status.in_(["failed", "pending"]))
    await session.execute(update(JobIntegration).where(*mine).values(status="pending", due_at=at, round=0, finished_at=None))


async def abandon(session: AsyncSession, job_id: str) -> None:
    """The job's files are gone: what was still to be done with them has failed."""
    error = ProblemError("integration_failed", "the job's files were removed before they were taken there").as_document()
    mine = (JobIntegration.job_id == job_id, JobIntegration.status.in_(["waiting", "pending", "running"]))
    await session.execute(update(JobIntegration).where(*mine).values(status="failed", error=error, due_at=None))


async def claim(session: AsyncSession, *, lease: timedelta, at: datetime) -> JobIntegration | None:
    """Take the one that is due the longest as its next try, or one whose try was lost; None if there is none."""
    query = (
        select(JobIntegration)
        .where(JobIntegration.status.in_(["pending", "running"]), JobIntegration.due_at <= at)
        .order_by(JobIntegration.due_at, JobIntegration.job_id, JobIntegration.position)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = await session.scalar(query)
    if row is not None:
        row.status, row.due_at = "running", at + lease
        row.attempts += 1
        row.round += 1
    return row


async def write(session: AsyncSession, row: JobIntegration, **values: Any) -> bool:
    """Change the row, if the try that `row` was claimed for still has it; whether it has."""
    mine = (
        JobIntegration.job_id == row.job_id,
        JobIntegration.position == row.position,
        JobIntegration.attempts == row.attempts,
        JobIntegration.status == "running",
    )
    changed = await session.scalar(update(JobIntegration).where(*mine).values(**values).returning(JobIntegration.position))
    return changed is not None
