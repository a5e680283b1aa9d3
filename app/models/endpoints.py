"""`/v1/models`: what can be pruned, and what was."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from app.accounts.auth import AuthenticatedRoute, ModelsReader
from app.models import registry
from app.parts import PartsDep
from secateur.schemas.models import Model, ModelPage

router = APIRouter(prefix="/models", tags=["models"], route_class=AuthenticatedRoute)


@router.get("")
async def list_models(parts: PartsDep, caller: ModelsReader) -> ModelPage:
    """Local models by name, then the newest output under each repository name. Always one page."""
    found: list[Model] = []
    if caller.tenant.reads_local_models:
        found += await asyncio.to_thread(parts.local_models.list)
    async with parts.database.read() as session:
        found += await registry.pruned_models(session, caller.tenant.id)
    return ModelPage(data=found, has_more=False, next_cursor=None)
