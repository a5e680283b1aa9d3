"""Models that jobs of this service made: found in the database, read from the artifact store, brought to this machine."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.artifacts.models import Artifact
from app.artifacts.store import Store
from app.jobs.models import Job
from app.jobs.states import ACTIVE, TERMINAL, Status
from app.models.hub import HubFile, Snapshot, room_problems
from app.settings import Settings
from secateur.problems import ProblemError, at
from secateur.recipes import Model

_JOB_ID = re.compile(r"job_[0-9a-z]+")
_RATE = re.compile(r"sparsity-(0\.[0-9]{1,12})")  # a revision: an elastic model that was materialised


@dataclass(frozen=True, slots=True)
class Made:
    """A model that a job made. Its `snapshot` names the repository and, as commit, the job."""

    snapshot: Snapshot
    tenant_id: str
    store: Store
    loop: asyncio.AbstractEventLoop

    def read(self, snapshot: Snapshot, path: str, start: int, end: int) -> bytes:
        """The bytes `start <= i < end` of a file, fewer if it ends before. For a thread that is not the loop's own."""
        return asyncio.run_coroutine_threadsafe(self._read(snapshot.files[path], start, end), self.loop).result()

    async def _read(self, file: HubFile, start: int, end: int) -> bytes:
        received = bytearray()
        async for piece in self.store.read(self.tenant_id, str(file.sha256), start, min(end, file.size)):
            received += piece
        return bytes(received)


async def find(session: AsyncSession, tenant_id: str, model: Model) -> Snapshot:
    """The files of the tenant's model: of a job by its id, or the newest (or, at a revision, exact) one of a repository.

    Raises, pointing at the model: `model_not_found`, also for another tenant's; `job_not_finished`; `model_gone`.
    """
    job = await session.scalar(_wanted(tenant_id, model))
    if job is None:
        raise _problem("model_not_found", f"No job of yours has made '{model.id}'{_at_revision(model)}.")
    if job.status not in TERMINAL:
        raise _problem("job_not_finished", f"Job {job.id}, which is to make the model, is {job.status}.")
    if job.status != Status.SUCCEEDED or job.repository is None:
        raise _problem("model_not_found", f"Job {job.id} made no model: it is of kind {job.kind} and has {job.status}.")
    rows = await session.scalars(select(Artifact).where(Artifact.job_id == job.id))
    files = {row.name: HubFile(row.name, row.size, row.sha256, None) for row in rows}
    if not files:
        raise _problem("model_gone", f"The files of job {job.id} are no longer kept.", hint="Run that job again.")
    return Snapshot(job.repository, job.id, files)


def _wanted(tenant_id: str, model: Model) -> Select[Job]:
    mine = select(Job).where(Job.tenant_id == tenant_id)
    if _JOB_ID.fullmatch(model.id):
        return mine.where(Job.id == model.id)
    there = (Job.status == Status.SUCCEEDED, Job.deleted_at.is_(None))
    if rate := _RATE.fullmatch(model.revision or ""):
        sparsity = Job.recipe["sparsity"]
        evenly = (sparsity["target"].as_float() == float(rate[1]), sparsity["allocation"]["name"].as_string() == "uniform")
        made = mine.where(Job.kind == "export", Job.model == model.id, *evenly, *there)
        return made.order_by(Job.finished_at.desc(), Job.id.desc()).limit(1)
    mine = mine.where(Job.repository == model.id)
    if model.revision is not None:
        return mine.where(Job.id == model.revision)
    return mine.where(*there).order_by(Job.finished_at.desc(), Job.id.desc()).limit(1)


def _at_revision(model: Model) -> str:
    return f" at revision '{model.revision}'" if model.revision else ""


def _problem(code: str, detail: str, *, hint: str | None = None) -> ProblemError:
    return at("/model/id", code, detail, hint=hint)


def folder_of(job_id: str, *, tenant_id: str, settings: Settings) -> Path:
    """Where this machine keeps the model that a job made."""
    return settings.cache_folder / tenant_id / "artifact" / job_id


async def fetch(snapshot: Snapshot, store: Store, *, tenant_id: str, scratch: Path, settings: Settings) -> Path:
    """The folder with the files of `snapshot`, each checked against its digest; linked where the store is on this disk.

    It appears when it is complete; `scratch`, on the same file system, is where it grows. Raises `model_file_corrupt`,
    `disk_full`, and `service_unavailable` if the store is away.
    """
    folder = folder_of(snapshot.commit, tenant_id=tenant_id, settings=settings)
    if not await asyncio.to_thread(folder.is_dir):
        with room_problems():
            await asyncio.to_thread(_empty, scratch)
            for file in snapshot.files.values():
                await _bring(file, store, tenant_id, scratch)
            await asyncio.to_thread(_settle, scratch, folder)
    return folder


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _settle(scratch: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        scratch.rename(folder)
    except OSError:  # another worker of this machine was faster
        if not folder.is_dir():
            raise
        shutil.rmtree(scratch)


async def _bring(file: HubFile, store: Store, tenant_id: str, folder: Path) -> None:
    target, sha256 = folder / Path(file.path).name, str(file.sha256)
    if not await store.link(tenant_id, sha256, target):
        with target.open("wb") as written:
            async for piece in store.read(tenant_id, sha256):
                await asyncio.to_thread(written.write, piece)
    if await asyncio.to_thread(_digest, target) != sha256:
        raise _problem("model_file_corrupt", f"{file.path} has another digest than it was stored under.")


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


async def unneeded(session: AsyncSession, job_ids: Collection[str]) -> Sequence[str]:
    """Those of `job_ids` whose models nobody needs on this machine: their files are gone, and no active job reads them."""
    kept = await session.scalars(select(Artifact.job_id).where(Artifact.job_id.in_(job_ids)))
    revision = Job.recipe["model"]["revision"].as_string()
    read = await session.scalars(select(revision).where(Job.status.in_(ACTIVE), revision.in_(job_ids)))
    return sorted(set(job_ids) - set(kept) - set(read))
