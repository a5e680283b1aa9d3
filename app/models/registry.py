"""The models that a tenant can prune, and those that it has pruned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.artifacts.models import Artifact
from app.jobs.models import Job
from app.jobs.states import Status
from app.models import local
from secateur.problems import ProblemError
from secateur.pruning.families import family_of
from secateur.pruning.headers import ModelHeaders
from secateur.recipes import Model, PruneRecipe
from secateur.schemas.models import LocalModel, PrunedModel
from secateur.schemas.problems import Problem

_MARKS = ("config.json", "*.safetensors", "*.gguf")


def local_models(root: Path) -> list[LocalModel]:
    """The folders below `root` that hold a model, by name; each with the reason if it cannot be pruned."""
    if not root.is_dir():
        return []
    folders = {file.parent for pattern in _MARKS for file in root.rglob(pattern)} - {root}
    names = sorted(folder.relative_to(root).as_posix() for folder in folders)
    return [_describe(name, root) for name in names if _is_id(name)]


def _is_id(name: str) -> bool:
    """Whether a recipe could name this folder; a hidden one, or one with a space in it, it could not."""
    try:
        Model(source="local", id=name)
    except ValidationError:
        return False
    return True


def _describe(name: str, root: Path) -> LocalModel:
    headers, problem = None, None
    try:
        headers = local.headers_of(name, root)
        if headers.format == "safetensors":
            family_of(headers)
    except ProblemError as error:
        problem = Problem.model_validate(error.as_document())
    return LocalModel(
        id=name,
        format=headers.format if headers else None,
        architecture=(headers.architecture or None) if headers else None,
        parameters=(headers.parameters or None) if headers else None,
        bytes=_weight(headers, root / name) if headers else None,
        problem=problem,
    )


def _weight(headers: ModelHeaders, folder: Path) -> int:
    return headers.bytes or sum((folder / file).stat().st_size for file in headers.files)


async def pruned_models(session: AsyncSession, tenant_id: str) -> Sequence[PrunedModel]:
    """The newest output under each repository name of the tenant, the newest first."""
    rank = func.row_number().over(partition_by=Job.repository, order_by=(Job.finished_at.desc(), Job.id.desc()))
    done = select(Job.id, rank.label("rank")).where(Job.tenant_id == tenant_id, Job.status == Status.SUCCEEDED).subquery()
    size = select(func.coalesce(func.sum(Artifact.size), 0)).where(Artifact.job_id == Job.id).scalar_subquery()
    query = (
        select(Job, size)
        .join(done, done.c.id == Job.id)
        .where(done.c.rank == 1)
        .order_by(Job.finished_at.desc(), Job.id.desc())
    )
    return [_shown(job, int(total)) for job, total in await session.execute(query)]


def _shown(job: Job, total: int) -> PrunedModel:
    recipe = PruneRecipe.model_validate(job.recipe)
    measured = (job.metrics or {}).get("sparsity")
    return PrunedModel(
        id=job.repository,
        job_id=job.id,
        base=recipe.model,
        method=job.method,
        pattern=recipe.sparsity.pattern,
        sparsity=recipe.sparsity.target if measured is None else measured,
        bytes=total,
        created_at=job.finished_at or job.created_at,
    )
