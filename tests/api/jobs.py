"""Tenants, keys and jobs, made as the service makes them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import delete

from app.accounts import keys
from app.accounts.keys import Scope
from app.accounts.models import Tenant
from app.artifacts.models import Artifact, Upload
from app.jobs import service
from app.jobs.models import Attempt, Event, IdempotencyRecord, Job, OutboxMessage
from app.jobs.states import ACTIVE, TERMINAL, Status
from app.kit import clock
from app.kit.db import Database
from app.kit.ids import new_id
from app.kit.keyring import Keyring
from app.webhooks.models import WebhookMessage
from secateur.recipes import PruneRecipe


def body(**changes: Any) -> dict[str, Any]:
    """The body of `POST /v1/jobs` for the model `tiny`, with some fields changed."""
    document: dict[str, Any] = {
        "kind": "prune",
        "model": {"source": "local", "id": "tiny"},
        "method": {"name": "wanda"},
        "sparsity": {"target": 0.5},
        "calibration": {"samples": 2, "sequence_length": 16},
    }
    return document | changes


async def make_tenant(database: Database, slug: str = "acme", *, reads_local_models: bool = True) -> Tenant:
    async with database.write() as session:
        tenant = Tenant(id=new_id("ten"), slug=slug, reads_local_models=reads_local_models, created_at=clock.now())
        session.add(tenant)
    return tenant


async def make_key(
    database: Database, tenant: Tenant, keyring: Keyring, scopes: Collection[Scope] = (Scope.ADMIN,), **columns: Any
) -> str:
    """A new key of the tenant; `columns` are set on its row."""
    key = keys.generate()
    async with database.write() as session:
        row = keys.add(session, tenant, key, name="test", scopes=scopes, keyring=keyring, at=clock.now())
        for name, value in columns.items():
            setattr(row, name, value)
    return key


async def forget_jobs(database: Database) -> None:
    """Empty the tables of jobs and of what belongs to them."""
    async with database.write() as session:
        for table in (Artifact, Upload, Attempt, Event, OutboxMessage, WebhookMessage, IdempotencyRecord, Job):
            await session.execute(delete(table))


async def make_job(database: Database, tenant: Tenant, *, at: datetime | None = None, **columns: Any) -> Job:
    """A queued job of the tenant; `columns` are set on its row, and what its `status` implies."""
    recipe = PruneRecipe.model_validate(body(metadata=columns.pop("labels", {})))
    at = at or clock.now()
    status = columns.get("status", Status.QUEUED)
    implied = {"lease_expires_at": at if status in ACTIVE else None, "finished_at": at if status in TERMINAL else None}
    async with database.write() as session:
        job, _ = await service.create(session, tenant, recipe, queue="cpu", at=at)
        for name, value in {**implied, **columns}.items():
            setattr(job, name, value)
    return job
