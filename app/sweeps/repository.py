"""Every query for sweeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import literal, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.models import Job
from app.kit.pagination import Position
from app.sweeps.models import Sweep, SweepJob


async def find(session: AsyncSession, tenant_id: str, sweep_id: str) -> Sweep | None:
    """The tenant's sweep, or None."""
    return await session.scalar(select(Sweep).where(Sweep.id == sweep_id, Sweep.tenant_id == tenant_id))


async def page(session: AsyncSession, tenant_id: str, *, before: Position | None, limit: int) -> Sequence[Sweep]:
    """The tenant's newest sweeps that are older than `before`."""
    query = select(Sweep).where(Sweep.tenant_id == tenant_id)
    if before is not None:
        there = tuple_(literal(before.created_at, Sweep.created_at.type), literal(before.id))
        query = query.where(tuple_(Sweep.created_at, Sweep.id) < there)
    return (await session.scalars(query.order_by(Sweep.created_at.desc(), Sweep.id.desc()).limit(limit))).all()


async def jobs_of(session: AsyncSession, sweep_ids: Collection[str]) -> Mapping[str, list[Job]]:
    """The jobs of each of the sweeps, in the table's order."""
    found: dict[str, list[Job]] = {sweep_id: [] for sweep_id in sweep_ids}
    query = select(SweepJob.sweep_id, Job).join(Job, Job.id == SweepJob.job_id).where(SweepJob.sweep_id.in_(sweep_ids))
    for sweep_id, job in await session.execute(query.order_by(SweepJob.sweep_id, SweepJob.position)):
        found[sweep_id].append(job)
    return found
