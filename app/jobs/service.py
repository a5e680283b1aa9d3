"""What a client can do with jobs. The caller opens the transaction, commits it, and then rings the doorbell."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.models import Tenant
from app.integrations import repository as integrations
from app.jobs import events, repository
from app.jobs.claims import announce
from app.jobs.models import Job, OutboxMessage
from app.jobs.states import RETRYABLE, Status
from app.kit.ids import new_id
from secateur.problems import ProblemError
from secateur.recipes import JobRecipe, ModelRecipe, Recipe, read_recipe


async def create(
    session: AsyncSession, tenant: Tenant, recipe: JobRecipe, *, queue: str, at: datetime, retry_of: str | None = None
) -> tuple[Job, OutboxMessage]:
    """Queue a job, with its first event and the doorbell that is to be rung once all of it is committed."""
    schedule = recipe.schedule
    job = Job(
        id=new_id("job"),
        tenant_id=tenant.id,
        kind=recipe.kind,
        status=Status.QUEUED,
        recipe=recipe.model_dump(mode="json"),
        model=recipe.model.id,
        method=recipe.method_name,
        repository=f"{tenant.slug}/{recipe.name}" if isinstance(recipe, ModelRecipe) else None,
        labels=recipe.metadata,
        queue=queue,
        priority=schedule.priority,
        start_by=at + timedelta(seconds=schedule.start_deadline) if schedule.start_deadline else None,
        max_runtime_seconds=schedule.max_runtime,
        retry_of=retry_of,
        attempt=0,
        event_seq=0,
        created_at=at,
        queued_at=at,
    )
    session.add(job)
    await session.flush()
    events.write(session, job, "status", "the job is queued", at=at, data={"status": Status.QUEUED, "attempt": 0})
    events.tell(session, job, at=at)
    if isinstance(recipe, ModelRecipe):
        integrations.add(session, job.id, recipe.integrations or [])
    return job, announce(session, job, at=at)


async def cancel(session: AsyncSession, tenant_id: str, job_id: str, *, at: datetime) -> Job:
    """Cancel a queued job at once, and have a running one ended by its worker. Nothing is done if that was done before.

    Raises `not_found`, and `job_not_cancellable` if the job has ended otherwise.
    """
    job = await repository.find_locked(session, tenant_id, job_id)
    if job is None:
        raise missing(job_id)
    if job.status == Status.QUEUED:
        events.move(session, job, Status.CANCELLED, "the job is cancelled", at=at)
    elif job.status == Status.RUNNING:
        events.move(session, job, Status.CANCELLING, "the job is to be cancelled; its worker is told", at=at)
    elif job.status not in {Status.CANCELLING, Status.CANCELLED}:
        raise ProblemError("job_not_cancellable", f"job {job_id} has {job.status} and cannot be cancelled any more")
    return job


async def cancel_if_active(session: AsyncSession, tenant_id: str, job_id: str, *, at: datetime) -> None:
    """Cancel a job as `cancel` does, unless it has ended meanwhile."""
    try:
        await cancel(session, tenant_id, job_id, at=at)
    except ProblemError as problem:
        if problem.code != "job_not_cancellable":
            raise


async def recipe_to_retry(session: AsyncSession, tenant_id: str, job_id: str) -> Recipe:
    """The recipe of a job that has failed, expired, or been cancelled, and so will not change any more.

    Raises `not_found` and `job_not_retryable`.
    """
    job = await repository.find(session, tenant_id, job_id)
    if job is None:
        raise missing(job_id)
    if job.deleted_at is not None:
        raise ProblemError("job_not_retryable", f"job {job_id} was deleted")
    if job.status not in RETRYABLE:
        raise ProblemError("job_not_retryable", f"job {job_id} is {job.status}; only one without success is retried")
    return read_recipe(job.recipe)


def missing(job_id: str) -> ProblemError:
    """The problem of a job that is not there, or is another tenant's: nobody is told which."""
    return ProblemError("not_found", f"there is no job {job_id}")
