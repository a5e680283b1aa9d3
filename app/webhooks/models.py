"""Where a tenant wants to be told, what there was to tell, and how the telling went."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from app.accounts.models import Tenant
from app.kit.db import Base


class WebhookEndpoint(Base):
    """An address of a tenant's, the messages it wants, and the secrets that they are signed with."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("ix_webhook_endpoints_tenant_id_created_at_id", "tenant_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    url: Mapped[str] = mapped_column(String(2000))
    types: Mapped[list[str]]
    """The types of message it wants; all if empty."""
    description: Mapped[str] = mapped_column(String(200))
    secret: Mapped[bytes] = mapped_column(LargeBinary)
    """Encrypted with the keyring; so is the one before, which signs too until `old_secret_until`."""
    old_secret: Mapped[bytes | None] = mapped_column(LargeBinary)
    old_secret_until: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]
    disabled_because: Mapped[str | None] = mapped_column(String(200))
    failing_since: Mapped[datetime | None]
    """When the first delivery failed after the last one that succeeded."""
    created_at: Mapped[datetime]


class WebhookMessage(Base):
    """Something to tell: written in the transaction in which it happened, given to the endpoints afterwards."""

    __tablename__ = "webhook_messages"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """The `webhook-id`: the same at every try, so that a receiver can tell a repetition."""
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    type: Mapped[str] = mapped_column(String(40))
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(index=True)
    spread_at: Mapped[datetime | None] = mapped_column(index=True)
    """When it was given to the endpoints that want it."""


class WebhookDelivery(Base):
    """One message on its way to one endpoint, with a log of the tries."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
        Index("ix_webhook_deliveries_status_due_at", "status", "due_at"),
        Index("ix_webhook_deliveries_endpoint_id_created_at_id", "endpoint_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey(WebhookEndpoint.id, ondelete="CASCADE"))
    message_id: Mapped[str] = mapped_column(ForeignKey(WebhookMessage.id, ondelete="CASCADE"), index=True)
    type: Mapped[str] = mapped_column(String(40))
    status: Mapped[str] = mapped_column(String(12))
    attempt: Mapped[int] = mapped_column(default=0)
    """The fence: raised by whoever sends it, and named by what is written afterwards."""
    round: Mapped[int] = mapped_column(default=0)
    """Tries since it was last asked for; the schedule of pauses goes by this."""
    due_at: Mapped[datetime | None]
    tries: Mapped[list[dict[str, Any]]]
    created_at: Mapped[datetime]
