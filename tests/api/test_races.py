"""Two writers at one job at the same time, on PostgreSQL: whatever both do, it is as if one had come after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.models import Tenant
from app.jobs import claims, repository, service
from app.jobs.claims import NewArtifact
from app.jobs.models import Job
from app.jobs.reaper import reap
from app.kit.db import Database
from secateur.problems import ProblemError
from tests.api.jobs import forget_jobs, make_job, make_tenant

T0 = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=30)

Act = Callable[[AsyncSession, Job], Awaitable[Any]]


async def _claim(session: AsyncSession, job: Job) -> Any:
    taken = await claims.claim(session, queues=["cpu"], worker="w", lease=LEASE, at=T0)
    return taken and taken.attempt


async def _cancel(session: AsyncSession, job: Job) -> Any:
    try:
        return (await service.cancel(session, job.tenant_id, job.id, at=T0)).status
    except ProblemError as problem:
        return problem.code


async def _succeed(session: AsyncSession, job: Job) -> Any:
    files = [NewArtifact("model.safetensors", 1, "a" * 64)]
    return await claims.succeed(session, job.id, 1, metrics={}, report={}, artifacts=files, at=T0)


async def _fail(session: AsyncSession, job: Job) -> Any:
    return await claims.fail(
        session, job.id, 1, error={"code": "internal_error", "detail": "x"}, max_barren_attempts=3, at=T0
    )


async def _release(session: AsyncSession, job: Job) -> Any:
    return await claims.release(session, job.id, 1, at=T0)


async def _renew(session: AsyncSession, job: Job) -> Any:
    return await claims.renew(session, job.id, 1, lease=5 * LEASE, at=T0)


async def _reap(session: AsyncSession, job: Job) -> Any:
    await reap(session, at=T0 + 2 * LEASE, max_barren_attempts=3)


RUNNING: dict[str, Act] = {
    "cancel": _cancel,
    "succeed": _succeed,
    "fail": _fail,
    "release": _release,
    "renew": _renew,
    "reap": _reap,
}


@pytest.fixture
async def database(postgresql_database_url: str) -> AsyncIterator[Database]:
    database = Database(postgresql_database_url)
    yield database
    await database.close()


@pytest.fixture
async def tenant(database: Database) -> Tenant:
    return await make_tenant(database)


async def _told(database: Database, job: Job) -> tuple[Any, ...]:
    """All that is known of the job but its id."""
    async with database.read() as session:
        now = (await session.scalars(select(Job).where(Job.id == job.id))).one()
        events = await repository.events_after(session, job.id, 0, 100)
        tries = await repository.attempts_of(session, job.id)
        files = (await repository.artifacts_of(session, [job.id]))[job.id]
    return (
        (now.status, now.attempt, now.barren_attempts, now.lease_expires_at, now.event_seq, len(files)),
        [(event.seq, event.message) for event in events],
        [(one.number, one.ended_at, one.outcome) for one in tries],
    )


async def _alone(database: Database, act: Act, job: Job) -> Any:
    async with database.write() as session:
        return await act(session, job)


async def _side_by_side(database: Database, first: Act, second: Act, job: Job) -> Any:
    """What `second` is answered, which begins when `first` has done everything but to commit."""
    async with database.write() as session:
        await first(session, job)
        await session.flush()
        other = asyncio.create_task(_alone(database, second, job))
        await asyncio.wait({other}, timeout=0.05)
    return await other


async def _check(database: Database, tenant: Tenant, first: Act, second: Act, before: Act | None = None) -> None:
    """Both ways on a new job each, which nothing else is beside."""
    results = []
    for raced in (True, False):
        await forget_jobs(database)
        job = await make_job(database, tenant, at=T0)
        if before:
            await _alone(database, before, job)
        if raced:
            answer = await _side_by_side(database, first, second, job)
        else:
            await _alone(database, first, job)
            answer = await _alone(database, second, job)
        if second is _reap:  # it passes over what somebody is just changing, and comes again
            await _alone(database, _reap, job)
        results.append((answer, await _told(database, job)))
    assert results[0] == results[1]


@pytest.mark.parametrize("second", RUNNING)
@pytest.mark.parametrize("first", RUNNING)
async def test_two_writers_at_a_running_job(database: Database, tenant: Tenant, first: str, second: str) -> None:
    await _check(database, tenant, RUNNING[first], RUNNING[second], before=_claim)


@pytest.mark.parametrize("second", [_claim, _cancel])
@pytest.mark.parametrize("first", [_claim, _cancel])
async def test_two_writers_at_a_queued_job(database: Database, tenant: Tenant, first: Act, second: Act) -> None:
    await _check(database, tenant, first, second)
