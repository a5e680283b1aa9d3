"""Every query for webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy import Select, delete, func, literal, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.kit.pagination import Position
from app.webhooks.models import WebhookDelivery, WebhookEndpoint, WebhookMessage

Endpoint, Delivery, Message = WebhookEndpoint, WebhookDelivery, WebhookMessage
Row = TypeVar("Row", WebhookEndpoint, WebhookDelivery)


async def find(session: AsyncSession, tenant_id: str, endpoint_id: str, *, locked: bool = False) -> WebhookEndpoint | None:
    """The tenant's endpoint, or None; `locked` if it is to be changed."""
    query = select(Endpoint).where(Endpoint.id == endpoint_id, Endpoint.tenant_id == tenant_id)
    return await session.scalar(query.with_for_update() if locked else query)


async def count_endpoints(session: AsyncSession, tenant_id: str) -> int:
    """How many endpoints the tenant has."""
    return await session.scalar(select(func.count()).where(Endpoint.tenant_id == tenant_id)) or 0


async def endpoints_page(
    session: AsyncSession, tenant_id: str, *, before: Position | None, limit: int
) -> Sequence[WebhookEndpoint]:
    """The tenant's newest endpoints that are older than `before`."""
    query = select(Endpoint).where(Endpoint.tenant_id == tenant_id)
    return (await session.scalars(_newest(query, Endpoint.created_at, Endpoint.id, before, limit))).all()


async def deliveries_page(
    session: AsyncSession, endpoint_id: str, *, before: Position | None, limit: int
) -> Sequence[WebhookDelivery]:
    """The endpoint's newest deliveries that are older than `before`."""
    query = select(Delivery).where(Delivery.endpoint_id == endpoint_id)
    return (await session.scalars(_newest(query, Delivery.created_at, Delivery.id, before, limit))).all()


async def find_delivery(session: AsyncSession, endpoint_id: str, delivery_id: str) -> WebhookDelivery | None:
    """The endpoint's delivery, locked, or None."""
    query = select(Delivery).where(Delivery.id == delivery_id, Delivery.endpoint_id == endpoint_id)
    return await session.scalar(query.with_for_update())


async def unspread(
    session: AsyncSession, limit: int | None = None, *, tenant_id: str | None = None
) -> Sequence[WebhookMessage]:
    """The oldest messages, of one tenant or of all, that no endpoint was given yet, locked."""
    query = select(Message).where(Message.spread_at.is_(None)).order_by(Message.id).limit(limit)
    if tenant_id:
        query = query.where(Message.tenant_id == tenant_id)
    return (await session.scalars(query.with_for_update(skip_locked=True))).all()


async def enabled(session: AsyncSession, tenant_id: str) -> Sequence[WebhookEndpoint]:
    """The tenant's endpoints that are to be told things."""
    query = select(Endpoint).where(Endpoint.tenant_id == tenant_id, Endpoint.disabled_at.is_(None))
    return (await session.scalars(query)).all()


async def due(session: AsyncSession, at: datetime, limit: int) -> Sequence[WebhookDelivery]:
    """Deliveries that are to be tried now, locked, the longest due first; those of disabled endpoints rest."""
    query = (
        select(Delivery)
        .join(Endpoint, Endpoint.id == Delivery.endpoint_id)
        .where(Delivery.status == "pending", Delivery.due_at <= at, Endpoint.disabled_at.is_(None))
        .order_by(Delivery.due_at, Delivery.id)
        .limit(limit)
    )
    return (await session.scalars(query.with_for_update(skip_locked=True, of=Delivery))).all()


async def attempted(session: AsyncSession, delivery_id: str, attempt: int) -> tuple[WebhookDelivery, WebhookEndpoint] | None:
    """The delivery and its endpoint, locked, if `attempt` is still its newest one."""
    delivery = await session.scalar(
        select(Delivery).where(Delivery.id == delivery_id, Delivery.attempt == attempt).with_for_update()
    )
    if delivery is None:
        return None
    endpoint = await session.scalar(select(Endpoint).where(Endpoint.id == delivery.endpoint_id).with_for_update())
    return None if endpoint is None else (delivery, endpoint)


async def give_up(session: AsyncSession, endpoint_id: str) -> None:
    """What still waits for an endpoint that was disabled has failed; it can be sent again."""
    waiting = (Delivery.endpoint_id == endpoint_id, Delivery.status == "pending")
    await session.execute(update(Delivery).where(*waiting).values(status="failed", due_at=None))


async def forget(session: AsyncSession, at: datetime, keep: timedelta) -> None:
    """Delete messages older than `keep`, and their deliveries with them, unless one is still on its way."""
    on_its_way = select(Delivery.message_id).where(Delivery.status == "pending")
    old = Message.created_at < at - keep
    await session.execute(delete(Message).where(old, Message.spread_at.is_not(None), Message.id.not_in(on_its_way)))


def _newest(
    query: Select[Row],
    created_at: InstrumentedAttribute[datetime],
    id_: InstrumentedAttribute[str],
    before: Position | None,
    limit: int,
) -> Select[Row]:
    if before is not None:
        there = tuple_(literal(before.created_at, created_at.type), literal(before.id))
        query = query.where(tuple_(created_at, id_) < there)
    return query.order_by(created_at.desc(), id_.desc()).limit(limit)
