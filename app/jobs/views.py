"""A job as the API shows it, made from its rows."""

from __future__ import annotations

from collections.abc import Iterable

from app.artifacts.models import Artifact
from app.integrations.models import JobIntegration
from app.jobs.models import Job
from app.jobs.states import TERMINAL
from secateur.schemas import jobs as schemas
from secateur.schemas.artifacts import Artifact as ArtifactSchema


def show(
    job: Job,
    artifacts: Iterable[Artifact] = (),
    integrations: Iterable[JobIntegration] = (),
    waiting: schemas.Waiting | None = None,
) -> schemas.Job:
    """The job, its files, where they were taken, and how it stands in its queue."""
    return schemas.Job.model_validate({
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "stage": job.stage,
        "progress": job.progress,
        "queue": job.queue,
        "waiting": waiting,
        "attempt": job.attempt,
        "recipe": job.recipe,
        "metrics": job.metrics,
        "artifacts": [ArtifactSchema.model_validate(artifact) for artifact in artifacts],
        "integrations": [_integration(job, one) for one in integrations],
        "repository": job.repository,
        "retry_of": job.retry_of,
        "error": job.error,
        "artifacts_expire_at": job.artifacts_expire_at,
        "created_at": job.created_at,
        "queued_at": job.queued_at,
        "started_at": job.started_at,
        "cancelling_at": job.cancelling_at,
        "finished_at": job.finished_at,
        "deleted_at": job.deleted_at,
    })  # fmt: skip


def _integration(job: Job, row: JobIntegration) -> schemas.JobIntegration:
    """One that still waits for the success of a job that has ended is skipped."""
    skipped = row.status == "waiting" and job.status in TERMINAL
    return schemas.JobIntegration.model_validate({
        "name": row.name,
        "status": "skipped" if skipped else row.status,
        "attempts": row.attempts,
        "next_try_at": row.due_at if row.status == "pending" else None,
        "url": row.url,
        "error": row.error,
    })  # fmt: skip
