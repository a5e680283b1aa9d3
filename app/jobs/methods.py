"""`/v1/methods`: what can prune."""

from __future__ import annotations

from fastapi import APIRouter

from app.accounts.auth import AnyCaller, AuthenticatedRoute
from secateur.pruning import registry
from secateur.schemas.methods import Method, MethodList

router = APIRouter(prefix="/methods", tags=["methods"], route_class=AuthenticatedRoute)


@router.get("")
async def list_methods(_caller: AnyCaller) -> MethodList:
    """Each method: what it does, its paper, its parameters, its patterns and what it costs."""
    return MethodList(data=[_shown(card) for card in registry.methods()])


def _shown(card: registry.MethodCard) -> Method:
    return Method(
        name=card.name,
        kind=card.kind,
        summary=card.summary,
        paper=card.paper,
        patterns=list(card.patterns),
        cost=card.cost,
        parameters=card.parameters_schema(),
    )
