"""Webhooks: where the service tells that something has happened, and how the telling went."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from secateur.schemas.pages import Page

MessageType = Literal[
    "job.queued", "job.running", "job.cancelling", "job.succeeded", "job.failed", "job.cancelled", "job.expired"
]

Url = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Description = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00]*$")]
_TYPES = "The types of message that are sent; all if the list is empty."


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewWebhookEndpoint(_Body):
    """An address that is to be told."""

    url: Url = Field(description="An https:// address on the public internet.", examples=["https://example.com/hooks"])
    types: list[MessageType] = Field(default=[], description=_TYPES)
    description: Description = ""


class WebhookEndpointChange(_Body):
    """What is to be different; a field that is left out stays."""

    url: Url | None = None
    types: list[MessageType] | None = Field(default=None, description=_TYPES)
    description: Description | None = None
    enabled: bool | None = Field(default=None, description="`true` lets an endpoint that was disabled be told again.")


class WebhookEndpoint(BaseModel):
    """An address that is told. Its messages are signed after the Standard Webhooks specification."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    url: str
    types: list[str] = Field(description=_TYPES)
    description: str
    enabled: bool
    disabled_at: datetime | None
    disabled_because: str | None
    failing_since: datetime | None = Field(description="Since when no delivery has succeeded; null if the last one did.")
    created_at: datetime
    secret: str | None = Field(
        default=None, description="`whsec_…`, to verify signatures by. Shown when it is made, and never again."
    )


class WebhookEndpointPage(Page[WebhookEndpoint]):
    """Endpoints, newest first."""


class WebhookTry(BaseModel):
    """One try to deliver a message."""

    at: datetime
    status: int | None = Field(description="What the receiver answered; null if it did not.")
    error: str | None
    milliseconds: int


class WebhookDelivery(BaseModel):
    """One message on its way to one endpoint."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    endpoint_id: str
    message_id: str = Field(description="The `webhook-id`, the same at every try.")
    type: str
    status: Literal["pending", "delivered", "failed"]
    next_try_at: datetime | None
    tries: list[WebhookTry] = Field(description="The log, oldest first.")
    created_at: datetime


class WebhookDeliveryPage(Page[WebhookDelivery]):
    """Deliveries, newest first."""


class WebhookData(BaseModel):
    """What a message is about; the API tells the rest."""

    object: Literal["job", "webhook_endpoint"]
    id: str


class WebhookPayload(BaseModel):
    """The body of a message."""

    type: str = Field(examples=["job.succeeded"])
    timestamp: datetime = Field(description="When it happened.")
    data: WebhookData
