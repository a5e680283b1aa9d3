"""`/v1/integrations`: where finished models can be taken."""

from __future__ import annotations

from fastapi import APIRouter

from app.accounts.auth import AnyCaller, AuthenticatedRoute
from app.integrations.registry import INTEGRATIONS
from app.parts import PartsDep
from secateur.schemas.integrations import Integration, IntegrationList

router = APIRouter(prefix="/integrations", tags=["integrations"], route_class=AuthenticatedRoute)


@router.get("")
async def list_integrations(parts: PartsDep, _caller: AnyCaller) -> IntegrationList:
    """Each integration: what it does, its options, the secret it uses, and whether it can be used here."""
    return IntegrationList(
        data=[
            Integration(
                name=one.name,
                summary=one.summary,
                secret=one.secret,
                options=one.options.model_json_schema(),
                unavailable=one.unavailable(parts.settings),
            )
            for one in INTEGRATIONS.values()
        ]
    )
