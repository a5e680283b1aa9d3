"""A job as the API shows it, made from its rows."""

from __future__ import annotations

from collections.abc import Iterable

from app.artifacts.models import Artifact
from app.jobs.models import Job
from secateur.schemas import jobs as schemas
from secateur.schemas.artifacts import Artifact as ArtifactSchema


def show(job: Job, artifacts: Iterable[Artifact] = ()) -> schemas.Job:
    """The job and its files."""
    return schemas.Job.model_validate({
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "stage": job.stage,
        "progress": job.progress,
        "attempt": job.attempt,
        "recipe": job.recipe,
        "metrics": job.metrics,
        "artifacts": [ArtifactSchema.model_validate(artifact) for artifact in artifacts],
        "repository": job.repository,
        "retry_of": job.retry_of,
        "error": job.error,
        "created_at": job.created_at,
        "queued_at": job.queued_at,
        "started_at": job.started_at,
        "cancelling_at": job.cancelling_at,
        "finished_at": job.finished_at,
    })  # fmt: skip
