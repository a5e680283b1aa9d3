"""A worker's part, played by a test: it claims a job and ends it."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

from app.artifacts.store import open_store
from app.jobs import claims
from app.jobs.claims import NewArtifact
from app.jobs.models import Job
from app.kit import clock
from tests.api.conftest import Service
from tests.api.jobs import make_job

LEASE = timedelta(seconds=30)


async def claim(service: Service) -> Job:
    """The oldest queued job, running."""
    async with service.database.write() as session:
        job = await claims.claim(session, queues=["cpu"], worker="w", lease=LEASE, at=clock.now())
    assert job is not None
    return job


async def succeed(service: Service, folder: Path, files: dict[str, bytes], **metrics: Any) -> str:
    """A new job that has made these files, which pass through `folder`."""
    await make_job(service.database, service.tenant)
    job, made = await claim(service), []
    async with open_store(service.settings.store_url) as store:
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            (folder / sha256).write_bytes(content)
            await store.put_file(service.tenant.id, sha256, folder / sha256)
            made.append(NewArtifact(name, len(content), sha256))
    results: dict[str, Any] = {"metrics": metrics, "report": {"blocks": []}, "artifacts": made}
    async with service.database.write() as session:
        assert await claims.succeed(session, job.id, job.attempt, **results, at=clock.now())
    return job.id


async def fail(service: Service, error: dict[str, Any]) -> str:
    """A new job that has failed with this problem document."""
    await make_job(service.database, service.tenant)
    job = await claim(service)
    async with service.database.write() as session:
        assert await claims.fail(session, job.id, job.attempt, error=error, max_barren_attempts=1, at=clock.now())
    return job.id
