"""Every query for jobs and what belongs to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, false, func, literal, not_, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from app.artifacts.models import Artifact
from app.jobs.models import Attempt, Event, Job
from app.jobs.states import ACTIVE, TERMINAL, Status
from app.kit.pagination import Position


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs a list shows; what is empty lets all pass."""

    statuses: Collection[Status] = ()
    method: str | None = None
    model: str | None = None
    created_after: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """What a client that waits for a change looks at."""

    status: str
    stage: str | None
    progress: dict[str, Any] | None
    attempt: int


async def find(session: AsyncSession, tenant_id: str, job_id: str) -> Job | None:
    """The tenant's job, or None."""
    return await session.scalar(select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id))


async def find_locked(session: AsyncSession, tenant_id: str, job_id: str) -> Job | None:
    """The tenant's job, which nobody else can change before this transaction ends; or None."""
    return await session.scalar(_locked(select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id)))


async def attempted(session: AsyncSession, job_id: str, attempt: int, statuses: Collection[Status] = ACTIVE) -> Job | None:
    """The job, locked, if `attempt` is still the one that has it and it is in one of `statuses`; otherwise None."""
    mine = (Job.id == job_id, Job.attempt == attempt, Job.status.in_(statuses))
    return await session.scalar(_locked(select(Job).where(*mine)))


async def best_queued(session: AsyncSession, queues: Collection[str], at: datetime) -> Job | None:
    """The queued job that is to run next, locked; jobs that another worker is just claiming are passed over."""
    query = (
        select(Job)
        .where(Job.status == Status.QUEUED, Job.queue.in_(queues), not_(_is_late(at)))
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(1)
    )
    return await session.scalar(_locked(query, skip=True))


async def lost(session: AsyncSession, at: datetime) -> Sequence[Job]:
    """Jobs whose lease has run out, locked; those that somebody else is just changing are passed over."""
    query = select(Job).where(Job.status.in_(ACTIVE), Job.lease_expires_at < at)
    return (await session.scalars(_locked(query, skip=True))).all()


async def overrunning(session: AsyncSession, at: datetime) -> Sequence[Job]:
    """Running jobs that have used up their time, locked, as above."""
    query = select(Job).where(Job.status == Status.RUNNING, Job.stop_by < at)
    return (await session.scalars(_locked(query, skip=True))).all()


async def late(session: AsyncSession, at: datetime) -> Sequence[Job]:
    """Queued jobs that should have begun by now, locked, as above."""
    query = select(Job).where(Job.status == Status.QUEUED, _is_late(at))
    return (await session.scalars(_locked(query, skip=True))).all()


def _is_late(at: datetime) -> ColumnElement[bool]:
    """Only the first attempt has to begin in time; one that follows a lost one may not."""
    return and_(Job.attempt == 0, func.coalesce(Job.start_by < at, false()))


async def attempts_of(session: AsyncSession, job_id: str) -> Sequence[Attempt]:
    """The job's attempts, oldest first."""
    return (await session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number))).all()


async def run_so_far(session: AsyncSession, job_id: str) -> timedelta:
    """How long the job's attempts that are over have run, all together."""
    over = (one for one in await attempts_of(session, job_id) if one.ended_at is not None)
    return sum(((one.ended_at or one.started_at) - one.started_at for one in over), timedelta())


async def finished_among(session: AsyncSession, job_ids: Collection[str]) -> Sequence[str]:
    """Those of `job_ids` that have ended, or that the database does not know."""
    living = await session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.status.not_in(TERMINAL)))
    return sorted(set(job_ids) - set(living))


async def look(session: AsyncSession, job_id: str) -> Look | None:
    """The little that tells whether a job has changed."""
    row = (
        await session.execute(select(Job.status, Job.stage, Job.progress, Job.attempt).where(Job.id == job_id))
    ).one_or_none()
    return Look(*row) if row else None


async def page(
    session: AsyncSession, tenant_id: str, wanted: JobFilter, *, before: Position | None, limit: int
) -> Sequence[Job]:
    """The tenant's newest jobs that the filter lets pass and that are older than `before`."""
    query = select(Job).where(Job.tenant_id == tenant_id, Job.deleted_at.is_(None))
    if wanted.statuses:
        query = query.where(Job.status.in_(wanted.statuses))
    if wanted.method is not None:
        query = query.where(Job.method == wanted.method)
    if wanted.model is not None:
        query = query.where(Job.model == wanted.model)
    if wanted.created_after is not None:
        query = query.where(Job.created_at > wanted.created_after)
    for key, value in wanted.labels.items():
        query = query.where(_has_label(session, key, value))
    if before is not None:
        there = tuple_(literal(before.created_at, Job.created_at.type), literal(before.id))
        query = query.where(tuple_(Job.created_at, Job.id) < there)
    query = query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    return (await session.scalars(query)).all()


async def report_of(session: AsyncSession, job_id: str) -> dict[str, Any] | None:
    """The report of a job that has one."""
    return await session.scalar(select(Job.report).where(Job.id == job_id))


async def events_after(session: AsyncSession, job_id: str, seq: int, limit: int) -> Sequence[Event]:
    """The job's events with a number above `seq`, oldest first."""
    query = select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq).limit(limit)
    return (await session.scalars(query)).all()


async def event_heads(session: AsyncSession, job_ids: Collection[str]) -> Mapping[str, int]:
    """The number of each job's newest event."""
    rows = await session.execute(select(Job.id, Job.event_seq).where(Job.id.in_(job_ids)))
    return {row.id: row.event_seq for row in rows}


async def events_behind(session: AsyncSession, positions: Mapping[str, int], limit: int) -> Sequence[Event]:
    """Events of several jobs, each with a number above the one that `positions` has for its job; each job's oldest first."""
    news = or_(*(and_(Event.job_id == id_, Event.seq > seq) for id_, seq in positions.items()))
    return (await session.scalars(select(Event).where(news).order_by(Event.job_id, Event.seq).limit(limit))).all()


async def artifacts_of(session: AsyncSession, job_ids: Collection[str]) -> Mapping[str, list[Artifact]]:
    """The files of each of the jobs, by name; an empty list for a job without."""
    files: dict[str, list[Artifact]] = {job_id: [] for job_id in job_ids}
    query = select(Artifact).where(Artifact.job_id.in_(job_ids)).order_by(Artifact.name)
    for artifact in await session.scalars(query):
        files[artifact.job_id].append(artifact)
    return files


def _has_label(session: AsyncSession, key: str, value: str) -> ColumnElement[bool]:
    # Not by a JSON path: SQLite has no way to write every key in one.
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.jsonb_each_text
    pairs = each(Job.labels).table_valued("key", "value")
    return select(pairs.c.key).where(pairs.c.key == key, pairs.c.value == value).exists()


def _locked(query: Select[Job], *, skip: bool = False) -> Select[Job]:
    # SQLite has no row locks and needs none: Database.write() holds the lock of the whole file.
    return query.with_for_update(skip_locked=skip).execution_options(populate_existing=True)
