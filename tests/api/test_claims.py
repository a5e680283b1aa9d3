"""What workers write: one claims, the fence holds, and lost jobs come back or end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from app.accounts.models import Tenant
from app.artifacts.models import Artifact
from app.jobs import claims, repository, service
from app.jobs.claims import NewArtifact
from app.jobs.events import LogLine, move
from app.jobs.models import Event, Job, OutboxMessage
from app.jobs.reaper import Reaped, reap
from app.jobs.repository import finished_among
from app.jobs.states import TRANSITIONS, Status
from app.kit.db import Database
from tests.api.jobs import make_job, make_tenant

T0 = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=30)
FILE = NewArtifact(name="model.safetensors", size=3, sha256="a" * 64)


@pytest.fixture
async def tenant(database: Database) -> Tenant:
    return await make_tenant(database)


async def claim(database: Database, *, queues: Sequence[str] = ("cpu",), at: datetime = T0) -> Job | None:
    async with database.write() as session:
        return await claims.claim(session, queues=queues, worker="w", lease=LEASE, at=at)


async def claimed(database: Database, at: datetime = T0) -> Job:
    job = await claim(database, at=at)
    assert job is not None
    return job


async def record(database: Database, job: Job, done: int, *, stage: str = "pruning", at: datetime = T0) -> bool:
    progress = {"done": done, "total": 30, "unit": "blocks", "eta_seconds": 1.5}
    async with database.write() as session:
        return await claims.record(session, job.id, job.attempt, stage=stage, progress=progress, logs=[], at=at)


async def reaped(database: Database, at: datetime) -> Reaped:
    async with database.write() as session:
        return await reap(session, at=at, max_barren_attempts=3)


async def fetch(database: Database, job_id: str) -> Job:
    async with database.read() as session:
        return (await session.scalars(select(Job).where(Job.id == job_id))).one()


async def log_of(database: Database, job_id: str) -> list[Event]:
    async with database.read() as session:
        return list(await session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.seq)))


async def bells(database: Database) -> int:
    async with database.read() as session:
        return len((await session.scalars(select(OutboxMessage))).all())


async def test_a_claim_takes_the_most_urgent_then_the_oldest_job_of_its_queues(database: Database, tenant: Tenant) -> None:
    late = await make_job(database, tenant, at=T0 + timedelta(seconds=1))
    early = await make_job(database, tenant, at=T0)
    urgent = await make_job(database, tenant, at=T0 + timedelta(seconds=2), priority=1)
    await make_job(database, tenant, at=T0 - timedelta(hours=1), queue="gpu")
    taken = [await claim(database) for _ in range(4)]
    assert [job and job.id for job in taken] == [urgent.id, early.id, late.id, None]


async def test_a_claim_starts_an_attempt_with_a_lease_and_an_event(database: Database, tenant: Tenant) -> None:
    queued = await make_job(database, tenant)
    await claimed(database)
    job = await fetch(database, queued.id)
    assert (job.status, job.attempt, job.worker, job.started_at, job.lease_expires_at) == (
        "running", 1, "w", T0, T0 + LEASE,
    )  # fmt: skip
    assert [(event.seq, event.data) for event in await log_of(database, job.id)] == [
        (1, {"status": "queued", "attempt": 0}),
        (2, {"status": "running", "attempt": 1}),
    ]


async def test_of_eight_workers_one_gets_the_job(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    assert sum(job is not None for job in await asyncio.gather(*(claim(database) for _ in range(8)))) == 1


async def test_eight_workers_get_eight_jobs(database: Database, tenant: Tenant) -> None:
    made = {(await make_job(database, tenant)).id for _ in range(8)}
    taken = await asyncio.gather(*(claim(database) for _ in range(8)))
    assert {job.id for job in taken if job} == made


async def test_an_attempt_that_lost_its_job_can_write_nothing(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    zombie = await claimed(database)
    await reaped(database, T0 + 2 * LEASE)
    heir = await claimed(database, at=T0 + 2 * LEASE)
    before = len(await log_of(database, heir.id))
    mine = (zombie.id, zombie.attempt)
    async with database.write() as session:
        assert await claims.renew(session, *mine, lease=LEASE, at=T0) is None
        logs = [LogLine("info", "boo")]
        assert not await claims.record(session, *mine, stage="pruning", progress=None, logs=logs, at=T0)
        assert not await claims.succeed(session, *mine, metrics={}, report={}, artifacts=[FILE], at=T0)
        assert not await claims.fail(
            session, *mine, error={"code": "internal_error", "detail": "boo"}, max_barren_attempts=3, at=T0
        )
        assert not await claims.release(session, *mine, at=T0)
        assert not await claims.confirm_cancelled(session, *mine, at=T0)
    job = await fetch(database, heir.id)
    assert (job.status, job.attempt, job.stage, job.error, job.metrics) == ("running", 2, None, None, None)
    assert job.lease_expires_at == T0 + 3 * LEASE
    assert len(await log_of(database, heir.id)) == before


async def test_success_is_written_once_with_its_files(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    job = await claimed(database)
    metrics = {"sparsity": 0.5, "perplexity": {"dense": 20.0, "pruned": float("inf")}}
    for first in (True, False):
        async with database.write() as session:
            written = await claims.succeed(
                session, job.id, job.attempt, metrics=metrics, report={"blocks": [{"error": 0.25}]}, artifacts=[FILE], at=T0
            )
        assert written == (Status.SUCCEEDED if first else None)
    job = await fetch(database, job.id)
    assert (job.status, job.finished_at, job.lease_expires_at, job.worker) == ("succeeded", T0, None, None)
    # JSON has no infinity.
    assert job.metrics == {"sparsity": 0.5, "perplexity": {"dense": 20.0, "pruned": None}}
    async with database.read() as session:
        files = (await session.scalars(select(Artifact))).all()
    assert [(file.job_id, file.tenant_id, file.name, file.size) for file in files] == [
        (job.id, tenant.id, "model.safetensors", 3)
    ]


async def test_a_job_that_is_being_cancelled_can_only_become_cancelled(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    job = await claimed(database)
    async with database.write() as session:
        assert not await claims.confirm_cancelled(session, job.id, 1, at=T0)  # nobody asked for it
        await service.cancel(session, tenant.id, job.id, at=T0)
    async with database.write() as session:
        assert await claims.renew(session, job.id, 1, lease=LEASE, at=T0) is Status.CANCELLING
        assert not await claims.succeed(session, job.id, 1, metrics={}, report={}, artifacts=[FILE], at=T0)
        assert not await claims.fail(
            session, job.id, 1, error={"code": "internal_error", "detail": "boo"}, max_barren_attempts=3, at=T0
        )
        assert not await claims.release(session, job.id, 1, at=T0)
        assert await claims.confirm_cancelled(session, job.id, 1, at=T0)
    job = await fetch(database, job.id)
    assert (job.status, job.cancelling_at, job.finished_at) == ("cancelled", T0, T0)
    async with database.read() as session:
        assert (await session.scalars(select(Artifact))).all() == []


async def test_record_keeps_stage_progress_and_log_in_order(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    job = await claimed(database)
    lines = [LogLine("info", "reading"), LogLine("warning", "damping raised in \0 block 3 \ud800")]
    async with database.write() as session:
        assert await claims.record(session, job.id, 1, stage="calibrating", progress=None, logs=lines, at=T0)
    await record(database, job, 1)
    await record(database, job, 2)
    job = await fetch(database, job.id)
    assert job.stage == "pruning"
    assert job.progress == {"done": 2, "total": 30, "unit": "blocks", "eta_seconds": 1.5}
    events = (await log_of(database, job.id))[2:]
    assert [event.seq for event in events] == [3, 4, 5, 6, 7, 8]
    assert [(event.type, event.level, event.message) for event in events] == [
        ("stage", "info", "calibrating has begun"),
        ("log", "info", "reading"),
        ("log", "warning", "damping raised in \ufffd block 3 \ufffd"),
        ("stage", "info", "pruning has begun"),
        ("progress", "info", "1 of 30 blocks"),
        ("progress", "info", "2 of 30 blocks"),
    ]


async def test_a_drained_job_waits_for_another_worker_and_its_doorbell_is_rung(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    for _ in range(5):  # however often that happens
        job = await claimed(database)
        before = await bells(database)
        async with database.write() as session:
            assert await claims.release(session, job.id, job.attempt, at=T0)
        assert await bells(database) == before + 1
    assert (await fetch(database, job.id)).status == "queued"
    await claimed(database)
    assert await reaped(database, T0 + 2 * LEASE) == Reaped(requeued=1)


async def failed(database: Database, job: Job, code: str, *, larger_queue: str | None = None) -> Status | None:
    error = {"code": code, "detail": f"it was {code}"}
    async with database.write() as session:
        return await claims.fail(
            session, job.id, job.attempt, error=error, max_barren_attempts=3, larger_queue=larger_queue, at=T0
        )


async def test_what_may_go_better_elsewhere_is_tried_three_times_and_all_else_once(
    database: Database, tenant: Tenant
) -> None:
    await make_job(database, tenant)
    for ended in ("queued", "queued", "failed"):
        job = await claimed(database)
        before = await bells(database)
        assert await failed(database, job, "disk_full") == ended
        assert await bells(database) == before + (ended == "queued")
    job = await fetch(database, job.id)
    assert job.error is not None
    assert job.error["code"] == "disk_full"
    await make_job(database, tenant)
    assert await failed(database, await claimed(database), "nonfinite_activation") == "failed"


async def test_a_job_that_runs_out_of_memory_is_moved_up_once(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant, queue="gpu.24g", barren_attempts=2)
    job = await claim(database, queues=["gpu.24g"])
    assert job is not None
    assert await failed(database, job, "out_of_memory", larger_queue="gpu.80g") == "queued"
    assert await claim(database, queues=["gpu.24g"]) is None
    job = await claim(database, queues=["gpu.80g"])
    assert job is not None
    assert await failed(database, job, "out_of_memory", larger_queue="gpu.192g") == "failed"
    async with database.read() as session:
        tries = await repository.attempts_of(session, job.id)
    assert [(one.queue, one.outcome) for one in tries] == [("gpu.24g", "out_of_memory"), ("gpu.80g", "out_of_memory")]


async def test_without_a_larger_class_out_of_memory_is_the_end(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    assert await failed(database, await claimed(database), "out_of_memory") == "failed"


async def test_a_job_that_is_not_begun_by_its_start_deadline_expires(database: Database, tenant: Tenant) -> None:
    late = await make_job(database, tenant, start_by=T0 + LEASE)
    again = await make_job(database, tenant, start_by=T0 + LEASE, attempt=1)  # its first attempt was in time
    assert await reaped(database, T0 + LEASE) == Reaped()
    job = await claimed(database, at=T0 + 2 * LEASE)
    assert job.id == again.id
    assert await reaped(database, T0 + 2 * LEASE) == Reaped(expired=1)
    late = await fetch(database, late.id)
    assert late.error is not None
    assert (late.status, late.error["code"], late.finished_at) == ("expired", "start_deadline_missed", T0 + 2 * LEASE)


async def test_all_attempts_together_have_no_more_than_max_runtime(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant, max_runtime_seconds=50)
    first = await claimed(database)
    async with database.write() as session:
        await claims.release(session, first.id, 1, at=T0 + LEASE)
    second = await claimed(database, at=T0 + 10 * LEASE)  # waiting does not count
    assert second.stop_by == T0 + 10 * LEASE + timedelta(seconds=20)
    async with database.write() as session:
        await claims.renew(session, second.id, 2, lease=LEASE, at=second.stop_by)
    assert await reaped(database, second.stop_by) == Reaped()
    assert await reaped(database, second.stop_by + timedelta(seconds=1)) == Reaped(failed=1)
    job = await fetch(database, first.id)
    assert job.error is not None
    assert (job.error["code"], job.stop_by) == ("max_runtime_exceeded", None)
    async with database.write() as session:  # so its worker ends the child
        assert await claims.renew(session, job.id, 2, lease=LEASE, at=T0) is None


async def test_only_an_expired_lease_is_reaped(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    job = await claimed(database)
    assert await reaped(database, T0 + LEASE) == Reaped()
    async with database.write() as session:
        assert await claims.renew(session, job.id, 1, lease=LEASE, at=T0 + LEASE) is Status.RUNNING
    assert await reaped(database, T0 + LEASE + timedelta(seconds=1)) == Reaped()
    assert await reaped(database, T0 + 2 * LEASE + timedelta(seconds=1)) == Reaped(requeued=1)
    assert (await fetch(database, job.id)).lease_expires_at is None


async def test_three_attempts_without_a_new_block_end_the_job(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    at = T0
    # The block counts that each attempt reports before it is lost, and what becomes of the job.
    story = [([1, 2], "queued"), ([2], "queued"), ([], "queued"), ([2, 3], "queued"), ([3], "queued"), ([3], "queued")]
    for blocks, status in [*story, ([1], "failed")]:
        job = await claimed(database, at)
        for done in blocks:
            await record(database, job, done, at=at)
        at += 2 * LEASE
        before = await bells(database)
        await reaped(database, at)
        job = await fetch(database, job.id)
        assert job.status == status
        assert await bells(database) == before + (status == "queued")
    assert job.attempt == 7
    assert job.error is not None
    assert (job.error["code"], job.error["retryable"]) == ("worker_lost", True)


async def test_progress_of_another_stage_is_no_new_block(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    for attempt in range(1, 4):
        job = await claimed(database, T0 + 2 * attempt * LEASE)
        await record(database, job, 30, stage="evaluating")
        await reaped(database, T0 + 2 * (attempt + 1) * LEASE)
    assert (await fetch(database, job.id)).status == "failed"


async def test_a_job_that_is_being_cancelled_and_lost_is_cancelled(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    job = await claimed(database)
    async with database.write() as session:
        await service.cancel(session, tenant.id, job.id, at=T0)
    assert await reaped(database, T0 + 2 * LEASE) == Reaped(cancelled=1)
    assert (await fetch(database, job.id)).status == "cancelled"


async def test_two_reapers_reap_a_job_once(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    job = await claimed(database)
    results = await asyncio.gather(*(reaped(database, T0 + 2 * LEASE) for _ in range(4)))
    assert sum(result.requeued for result in results) == 1
    assert [event.seq for event in await log_of(database, job.id)] == [1, 2, 3]


async def test_events_of_writers_at_the_same_time_have_no_gaps(database: Database, tenant: Tenant) -> None:
    await make_job(database, tenant)
    job = await claimed(database)
    await asyncio.gather(*(record(database, job, done) for done in range(1, 11)))
    assert [event.seq for event in await log_of(database, job.id)] == list(range(1, 14))


async def test_finished_among_names_ended_and_unknown_jobs(database: Database, tenant: Tenant) -> None:
    queued, ended = await make_job(database, tenant), await make_job(database, tenant, status="failed")
    async with database.read() as session:
        assert await finished_among(session, [queued.id, ended.id, "job_gone"]) == sorted([ended.id, "job_gone"])


async def test_every_way_that_the_table_lacks_is_refused(database: Database, tenant: Tenant) -> None:
    queued = await make_job(database, tenant)
    for status in Status:
        for target in set(Status) - TRANSITIONS[status]:
            async with database.write() as session:
                job = (await session.scalars(select(Job).where(Job.id == queued.id))).one()
                session.expunge(job)
                job.status = status
                with pytest.raises(ValueError, match=f"no way leads from {status} to {target}"):
                    move(session, job, target, "", at=T0)
