"""How long a queued job has to wait: its place in the line, who serves it, and a guess at when it begins."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.models import Job
from app.jobs.presence import workers_by_queue
from app.jobs.states import ACTIVE, Status
from secateur.schemas.jobs import Waiting

RECENT = 20


async def waiting_of(session: AsyncSession, jobs: Collection[Job], *, at: datetime) -> Mapping[str, Waiting]:
    """For each of `jobs` that is queued, how it stands."""
    queued = {job.id: job.queue for job in jobs if job.status == Status.QUEUED}
    if not queued:
        return {}
    workers = await workers_by_queue(session, at=at)
    places = await _places(session, queued)
    paces = {queue: await _pace(session, queue, at) for queue in set(queued.values())}
    told = {}
    for job_id, place in places.items():
        queue = queued[job_id]
        serving = None if workers is None else workers[queue]
        eta = begins_in(place, paces[queue], serving) if serving else None
        told[job_id] = Waiting(position=place, workers=serving, eta_seconds=eta)
    return told


async def _places(session: AsyncSession, queued: Mapping[str, str]) -> Mapping[str, int]:
    order = (Job.priority.desc(), Job.created_at, Job.id)
    place = func.row_number().over(partition_by=Job.queue, order_by=order).label("place")
    mine = (Job.status == Status.QUEUED, Job.queue.in_(set(queued.values())))
    line = select(Job.id, place).where(*mine).subquery()
    rows = await session.execute(select(line.c.id, line.c.place).where(line.c.id.in_(queued)))
    return {row.id: row.place for row in rows}


Pace = tuple[timedelta | None, Sequence[timedelta]]
"""How long the latest jobs of a queue took on average, None without any; for how long each that runs has been running."""


async def _pace(session: AsyncSession, queue: str, at: datetime) -> Pace:
    ended = (Job.queue == queue, Job.status == Status.SUCCEEDED, Job.finished_at.is_not(None))
    query = select(Job.started_at, Job.finished_at).where(*ended).order_by(Job.finished_at.desc()).limit(RECENT)
    took = [finished - started for started, finished in await session.execute(query) if started and finished]
    running = select(Job.started_at).where(Job.queue == queue, Job.status.in_(ACTIVE))
    since = [at - started for started in await session.scalars(running) if started]
    return (sum(took, timedelta()) / len(took) if took else None), since


def begins_in(place: int, pace: Pace, workers: int) -> float | None:
    """Seconds until the job at `place` (from 1) of a queue begins, if all jobs take as long as the latest did.

    Each of the jobs that run needs what is left of that, each job ahead all of it, and `workers` share the work.
    """
    mean, since = pace
    if len(since) + place <= workers:
        return 0.0
    if mean is None:
        return None
    left = sum((max(mean - ran, timedelta()) for ran in since), timedelta())
    return round(((left + (place - 1) * mean) / workers).total_seconds(), 1)
