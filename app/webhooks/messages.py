"""What there is to tell: thin messages, for the receiver asks the API for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.kit.ids import new_id
from app.webhooks.models import WebhookMessage

PING = "webhook.ping"


def write(session: AsyncSession, tenant_id: str, type_: str, data: Mapping[str, Any], *, at: datetime) -> WebhookMessage:
    """Have the tenant's endpoints told, once this transaction is committed."""
    body = {"type": type_, "timestamp": at.isoformat(), "data": dict(data)}
    message = WebhookMessage(id=new_id("msg"), tenant_id=tenant_id, type=type_, body=body, created_at=at)
    session.add(message)
    return message
