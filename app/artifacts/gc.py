"""Collecting what nobody needs any more from the store, and finding what somebody needs and is not there.

A blob is needed while a file of a job names it, or while an active job is putting it there. That is asked, and the blob
removed, under one lock that every upload takes too before it begins: so an upload either is seen, or comes after the removal
and finds the blob gone. Nothing is guessed from the age of a blob.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.artifacts.models import Artifact, Upload
from app.artifacts.store import Store
from app.jobs import events
from app.jobs.models import Job
from app.jobs.states import ACTIVE
from app.kit.db import Database
from secateur.problems import ProblemError

BATCH = 50
_LOCK = 0x5EC47E03  # of PostgreSQL's advisory locks; on SQLite writers queue anyway

log = structlog.get_logger()

Key = tuple[str, str]
"""A tenant's id and a blob's digest."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a round has done."""

    blobs: int = 0
    bytes: int = 0
    unfinished: int = 0
    """Uploads that were broken off, and whose pieces were removed."""
    lost: int = 0
    """Files whose bytes were found missing."""


async def begin_upload(session: AsyncSession, job: Job, digests: Collection[str], *, at: datetime) -> None:
    """Have these blobs left in peace while the job, whose row is locked, is active. To be committed before they are put."""
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock_shared(_LOCK)))
    for sha256 in sorted(set(digests)):
        await session.merge(Upload(job_id=job.id, sha256=sha256, begun_at=at))


async def collect(database: Database, store: Store, *, at: datetime, grace: timedelta) -> Collected:
    """One round over the whole store: remove every blob that nobody needs, and report every file whose blob is not there.

    Blobs, and pieces of uploads, younger than `grace` are left for a later round. Raises `service_unavailable` if the store
    is away.
    """
    unfinished = await store.drop_unfinished(at - grace)
    present: set[Key] = set()
    old: dict[Key, int] = {}
    async for blob in store.blobs():
        present.add((blob.tenant_id, blob.sha256))
        if blob.modified_at <= at - grace:
            old[blob.tenant_id, blob.sha256] = blob.size
    keys, removed = list(old), set[Key]()
    for start in range(0, len(keys), BATCH):
        removed |= await _remove_unneeded(database, store, keys[start : start + BATCH])
    lost = await _report_lost(database, store, present, at)
    async with database.write() as session:
        await session.execute(delete(Upload).where(Upload.job_id.in_(select(Job.id).where(Job.status.not_in(ACTIVE)))))
    collected = Collected(len(removed), sum(old[key] for key in removed), unfinished, lost)
    if collected != Collected():
        log.info("collected", blobs=collected.blobs, bytes=collected.bytes, unfinished=unfinished, lost=lost)
    return collected


async def remove(database: Database, store: Store, tenant_id: str, digests: Sequence[str]) -> None:
    """Remove these blobs, unless somebody still needs them: the next round would, but a user who deletes should not wait."""
    try:
        await _remove_unneeded(database, store, [(tenant_id, sha256) for sha256 in digests])
    except ProblemError as problem:
        log.warning("removal_left_to_the_next_round", detail=problem.detail)


async def _remove_unneeded(database: Database, store: Store, keys: Sequence[Key]) -> set[Key]:
    async with database.write() as session:
        if not database.is_sqlite:
            await session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        unneeded = set(keys) - await _needed(session, {sha256 for _, sha256 in keys})
        for key in sorted(unneeded):
            await store.delete(*key)
    return unneeded


async def _needed(session: AsyncSession, digests: Collection[str]) -> set[Key]:
    files = select(Artifact.tenant_id, Artifact.sha256).where(Artifact.sha256.in_(digests))
    active = (Upload.sha256.in_(digests), Job.status.in_(ACTIVE))
    coming = select(Job.tenant_id, Upload.sha256).join(Job, Job.id == Upload.job_id).where(*active)
    rows = [*(await session.execute(files)), *(await session.execute(coming))]
    return {(tenant_id, sha256) for tenant_id, sha256 in rows}


async def _report_lost(database: Database, store: Store, present: Collection[Key], at: datetime) -> int:
    """Mark the files whose blob is not there, and tell their jobs' logs; a mark is taken off when the blob is back."""
    async with database.read() as session:
        rows = await session.execute(select(Artifact.id, Artifact.tenant_id, Artifact.sha256, Artifact.lost_at))
        files = [(row.id, (row.tenant_id, row.sha256), row.lost_at is not None) for row in rows]
    newly = 0
    for artifact_id, key, known_lost in files:
        # What came after the store was listed is asked for by itself.
        lost = key not in present and not await store.exists(*key)
        if lost != known_lost:
            newly += await _mark(database, artifact_id, at if lost else None, at)
    return newly


async def _mark(database: Database, artifact_id: str, lost_at: datetime | None, at: datetime) -> bool:
    """Whether the file is there and is lost."""
    async with database.write() as session:
        artifact = await session.get(Artifact, artifact_id)
        if artifact is None:
            return False
        job = await session.get_one(Job, artifact.job_id, with_for_update=True)
        artifact.lost_at = lost_at
        if lost_at is None:
            events.write(session, job, "log", f"the bytes of {artifact.name} are in the store again", at=at)
            return False
        log.error("artifact_lost", job_id=job.id, artifact_id=artifact_id, name=artifact.name)
        events.write(session, job, "log", f"the bytes of {artifact.name} are not in the store", at=at, level="error")
        return True
