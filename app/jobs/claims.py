"""What a worker writes: it claims a job, keeps it, and says how it ended.

Every write names the attempt that makes it. If another attempt has the job by now, or it has ended, the writer is fenced:
nothing is written, and it is told so (None, or False). What ends an attempt returns the state that the job is in then. All
sessions are those of `Database.write()`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from app.artifacts import gc
from app.artifacts.models import Artifact
from app.integrations import repository as integrations
from app.jobs import events, repository
from app.jobs.events import LogLine
from app.jobs.models import Attempt, Job, OutboxMessage
from app.jobs.states import ACTIVE, Outcome, Status
from app.kit.ids import new_id
from secateur.schemas.events import Level

# Another worker, or the same one later, may do better; whatever else a run fails with, it would fail with again.
INFRASTRUCTURE = frozenset({"service_unavailable", "hub_unavailable", "mlflow_unavailable", "disk_full"})


@dataclass(frozen=True, slots=True)
class NewArtifact:
    """A file that lies in the store by now: its path inside the model's folder, its bytes, its digest."""

    name: str
    size: int
    sha256: str


async def claim(session: AsyncSession, *, queues: Sequence[str], worker: str, lease: timedelta, at: datetime) -> Job | None:
    """Take the best queued job of `queues`, by priority and then age, as its next attempt; None if there is none."""
    job = await repository.best_queued(session, queues, at)
    if job is None:
        return None
    if job.max_runtime_seconds is not None:
        job.stop_by = at + timedelta(seconds=job.max_runtime_seconds) - await repository.run_so_far(session, job.id)
    job.attempt += 1
    job.barren_attempts += 1
    job.worker = worker
    job.lease_expires_at = at + lease
    job.stage = job.progress = None
    begun = {"worker": worker, "queue": job.queue, "blocks_done": job.blocks_done, "started_at": at}
    session.add(Attempt(job_id=job.id, number=job.attempt, **begun))
    events.move(session, job, Status.RUNNING, f"attempt {job.attempt} has begun", at=at)
    return job


async def decline(session: AsyncSession, *, queues: Sequence[str], why: str, at: datetime) -> None:
    """Tell in the log of the job that a claim would take why it is not taken, unless that is what was told last."""
    job = await repository.best_queued(session, queues, at)
    if job is None:
        return
    newest = await repository.events_after(session, job.id, job.event_seq - 1, 1)
    if [event.message for event in newest] != [why]:
        events.write(session, job, "log", why, at=at, level="warning")


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


async def begin_upload(
    session: AsyncSession, job_id: str, attempt: int, *, digests: Collection[str], at: datetime
) -> Status | None:
    """Have these blobs left in peace until the job ends; to be committed before they are put. None if fenced."""
    job = await repository.attempted(session, job_id, attempt)
    if job is None:
        return None
    await gc.begin_upload(session, job, digests, at=at)
    return Status(job.status)


async def succeed(
    session: AsyncSession,
    job_id: str,
    attempt: int,
    *,
    metrics: Mapping[str, Any],
    report: Mapping[str, Any],
    artifacts: Sequence[NewArtifact],
    keep_for: timedelta | None = None,
    at: datetime,
) -> Status | None:
    """End the job with its results; its files go after `keep_for`. None if fenced, or if it is to be cancelled."""
    job = await repository.attempted(session, job_id, attempt, {Status.RUNNING})
    if job is None:
        return None
    job.metrics, job.report = dict(metrics), dict(report)
    job.artifacts_expire_at = at + keep_for if keep_for else None
    made = {"tenant_id": job.tenant_id, "job_id": job.id, "created_at": at}
    session.add_all(Artifact(id=new_id("art"), **asdict(artifact), **made) for artifact in artifacts)
    await integrations.start(session, job.id, at=at)
    return await leave(session, job, Status.SUCCEEDED, Outcome.SUCCEEDED, "the job has succeeded", at=at)


async def fail(
    session: AsyncSession,
    job_id: str,
    attempt: int,
    *,
    error: Mapping[str, Any],
    max_barren_attempts: int,
    larger_queue: str | None = None,
    at: datetime,
) -> Status | None:
    """End the attempt with a problem document, and the job with it, unless another attempt may do better.

    One that ran out of memory is moved to `larger_queue`, once. One that failed for want of something around it waits for
    another attempt, unless this was the last of `max_barren_attempts`. None if fenced, or if the job is to be cancelled.
    """
    job = await repository.attempted(session, job_id, attempt, {Status.RUNNING})
    if job is None:
        return None
    detail = str(error["detail"])
    out_of_memory = error["code"] == "out_of_memory"
    if out_of_memory and larger_queue and not job.outgrown_queue:
        job.outgrown_queue, job.queue, job.barren_attempts = job.queue, larger_queue, 0
        return await requeue(session, job, Outcome.OUT_OF_MEMORY, f"{detail}; the job waits for {larger_queue}", at=at)
    if error["code"] in INFRASTRUCTURE and job.barren_attempts < max_barren_attempts:
        return await requeue(session, job, Outcome.FAILED, f"{detail}; the job waits for another attempt", at=at)
    job.error = dict(error)
    outcome = Outcome.OUT_OF_MEMORY if out_of_memory else Outcome.FAILED
    return await leave(session, job, Status.FAILED, outcome, detail, at=at, level="error")


async def confirm_cancelled(session: AsyncSession, job_id: str, attempt: int, *, at: datetime) -> Status | None:
    """End a job that was to be cancelled, now that nothing of it runs. None if fenced, or if nobody cancelled it."""
    job = await repository.attempted(session, job_id, attempt, {Status.CANCELLING})
    if job is None:
        return None
    return await leave(session, job, Status.CANCELLED, Outcome.CANCELLED, "the job is cancelled", at=at)


async def release(session: AsyncSession, job_id: str, attempt: int, *, at: datetime) -> Status | None:
    """Give the job back to its queue, because the worker is drained. None if fenced, or if it is to be cancelled."""
    job = await repository.attempted(session, job_id, attempt, {Status.RUNNING})
    if job is None:
        return None
    job.barren_attempts = max(0, job.barren_attempts - 1)
    told = "the worker was told to stop; the job waits for another one"
    return await requeue(session, job, Outcome.DRAINED, told, at=at)


async def requeue(session: AsyncSession, job: Job, outcome: Outcome, message: str, *, at: datetime) -> Status:
    """End the attempt of the job, whose row is locked; put the job back into its queue, and have the doorbell rung."""
    announce(session, job, at=at)
    return await leave(session, job, Status.QUEUED, outcome, message, at=at, level="warning")


async def leave(
    session: AsyncSession, job: Job, status: Status, outcome: Outcome, message: str, *, at: datetime, level: Level = "info"
) -> Status:
    """Take the job, whose row is locked, from its worker: the attempt is over, and the job is in `status` now."""
    mine = (Attempt.job_id == job.id, Attempt.number == job.attempt)
    ended = {"ended_at": at, "outcome": outcome, "blocks_done": job.blocks_done}
    await session.execute(update(Attempt).where(*mine).values(**ended))
    events.move(session, job, status, message, at=at, level=level)
    return status


def announce(session: AsyncSession, job: Job, *, at: datetime) -> OutboxMessage:
    """Have the doorbell of the job's queue rung, once this transaction is committed."""
    bell = OutboxMessage(id=new_id("out"), queue=job.queue, created_at=at)
    session.add(bell)
    return bell
