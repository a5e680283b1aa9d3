"""The models that a tenant can prune, and those that it has pruned."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.artifacts.models import Artifact
from app.jobs.models import Job
from app.jobs.states import Status
from app.models import local, parsing
from secateur.problems import ProblemError
from secateur.pruning.discovery import family_of
from secateur.pruning.headers import ModelHeaders
from secateur.recipes import ExportRecipe, Model, PruneRecipe, read_model_recipe
from secateur.schemas.models import LocalModel, PrunedModel
from secateur.schemas.problems import Problem

_MARKS = ("config.json", "*.safetensors", "*.gguf")
_Stamps = frozenset[tuple[str, int, int, int]]


class LocalModels:
    """The folders below `root` that hold a model. Each is read again only when something in it has changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[_Stamps, LocalModel]] = {}
        self._turn = threading.Lock()

    def list(self) -> list[LocalModel]:
        """By name; each with the reason if it cannot be pruned. Blocks; safe to be called by several threads."""
        if not self._root.is_dir():
            return []
        folders = {file.parent for pattern in _MARKS for file in self._root.rglob(pattern)} - {self._root}
        names = sorted(folder.relative_to(self._root).as_posix() for folder in folders)
        with self._turn:
            self._known = {name: self._look(name) for name in names if _is_id(name)}
            return [model for _, model in self._known.values()]

    def _look(self, name: str) -> tuple[_Stamps, LocalModel]:
        stamps = _stamps_of(self._root / name)
        known = self._known.get(name)
        if known and known[0] == stamps:
            return known
        with parsing.one_at_a_time:
            return stamps, _describe(name, self._root)


def _stamps_of(folder: Path) -> _Stamps:
    """Name, inode, size and time of change of all that is in the folder; of links, also what they lead to."""
    stamps = set()
    for path in folder.rglob("*"):
        for follow in (False, True):
            with suppress(OSError):
                found = path.stat(follow_symlinks=follow)
                stamps.add((str(path), found.st_ino, found.st_size, found.st_ctime_ns))
    return frozenset(stamps)


def _is_id(name: str) -> bool:
    """Whether a recipe could name this folder; a hidden one, or one with a space in it, it could not."""
    try:
        Model(source="local", id=name)
    except ValidationError:
        return False
    return True


def _describe(name: str, root: Path) -> LocalModel:
    headers: ModelHeaders | None = None
    problem: Problem | None = None
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
        bytes=headers.bytes if headers else None,
        problem=problem,
    )


async def pruned_models(session: AsyncSession, tenant_id: str) -> Sequence[PrunedModel]:
    """The newest output under each repository name of the tenant, the newest first."""
    rank = func.row_number().over(partition_by=Job.repository, order_by=(Job.finished_at.desc(), Job.id.desc()))
    mine = (Job.tenant_id == tenant_id, Job.status == Status.SUCCEEDED, Job.repository.is_not(None))
    done = select(Job.id, rank.label("rank")).where(*mine).subquery()
    size = select(func.coalesce(func.sum(Artifact.size), 0)).where(Artifact.job_id == Job.id).scalar_subquery()
    query = (
        select(Job, size)
        .join(done, done.c.id == Job.id)
        .where(done.c.rank == 1)
        .order_by(Job.finished_at.desc(), Job.id.desc())
    )
    return [_shown(job, int(total)) for job, total in await session.execute(query)]


def _shown(job: Job, total: int) -> PrunedModel:
    recipe = read_model_recipe(job.recipe)
    asked = recipe.sparsity.target if isinstance(recipe, PruneRecipe | ExportRecipe) else None
    measured = (job.metrics or {}).get("sparsity")
    return PrunedModel(
        id=str(job.repository),
        job_id=job.id,
        base=recipe.model,
        method=job.method or recipe.kind,
        pattern=recipe.pattern,
        sparsity=asked if measured is None else measured,
        bytes=total,
        created_at=job.finished_at or job.created_at,
    )
