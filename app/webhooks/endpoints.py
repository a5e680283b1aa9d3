"""`/v1/webhook-endpoints`: where a tenant is told, the log of what it was told, and ways to try it out."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Response
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.auth import AuthenticatedRoute, WebhooksWriter
from app.jobs.idempotency import Answer, IdempotencyKey, intent_of, once, reserved
from app.kit import clock
from app.kit.errors import declare
from app.kit.ids import new_id
from app.kit.pagination import cut, read_cursor
from app.parts import Parts, PartsDep
from app.webhooks import connect, delivery, messages, repository, signing
from app.webhooks.models import WebhookDelivery as DeliveryRow
from app.webhooks.models import WebhookEndpoint as EndpointRow
from secateur.problems import ProblemError, at
from secateur.schemas.webhooks import (
    NewWebhookEndpoint,
    WebhookDelivery,
    WebhookDeliveryPage,
    WebhookEndpoint,
    WebhookEndpointChange,
    WebhookEndpointPage,
    WebhookPayload,
)

MAX_ENDPOINTS = 50
OLD_SECRET_SIGNS_FOR = timedelta(hours=24)

Limit = Annotated[int, Query(ge=1, le=100)]

router = APIRouter(prefix="/webhook-endpoints", tags=["webhooks"], route_class=AuthenticatedRoute)
outgoing = APIRouter(tags=["webhooks"])


@outgoing.post("message", status_code=204, responses={"default": {"description": "Anything but 2xx: it is sent again."}})
def message(body: WebhookPayload) -> None:
    """What an endpoint is sent. Verify `webhook-signature` over `webhook-id`, `webhook-timestamp` and the raw body, answer
    2xx within 15 seconds, and take a message with an id that you have seen for a repetition."""


@router.post(
    "",
    status_code=201,
    response_model=WebhookEndpoint,
    responses=declare(
        "bad_request",
        "body_too_large",
        "validation_error",
        "idempotency_key_reused",
        "idempotency_key_in_flight",
        "too_many_webhook_endpoints",
    ),
)
async def create_webhook_endpoint(
    wanted: NewWebhookEndpoint, parts: PartsDep, caller: WebhooksWriter, idempotency_key: IdempotencyKey = None
) -> Response:
    """Have an address told. The answer holds the secret that messages are signed with; a repeated answer does not."""
    intent = intent_of(caller.tenant.id, idempotency_key, "create_webhook_endpoint", wanted.model_dump_json())
    async with reserved(parts.database, intent, at=clock.now()) as earlier:
        if earlier is not None:
            return earlier.response()
        _check(wanted.url, parts)
        secret = signing.new_secret()

        async def create(session: AsyncSession) -> Answer:
            if await repository.count_endpoints(session, caller.tenant.id) >= MAX_ENDPOINTS:
                told = f"there are {MAX_ENDPOINTS} webhook endpoints already"
                raise ProblemError("too_many_webhook_endpoints", told, hint="Delete one that is not needed.")
            await delivery.spread_now(session, caller.tenant.id, at=clock.now())
            row = EndpointRow(
                id=new_id("whk"),
                tenant_id=caller.tenant.id,
                url=wanted.url,
                types=sorted(set(wanted.types)),
                description=wanted.description,
                secret=parts.keyring.encrypt(secret),
                created_at=clock.now(),
            )
            session.add(row)
            await session.flush()
            # The answer is kept for repetitions, and a secret must not lie there open.
            return Answer(201, {"Location": f"/v1/webhook-endpoints/{row.id}"}, _show(row).model_dump(mode="json"))

        answer = await once(parts.database, intent, create, at=clock.now())
        return Answer(answer.status, answer.headers, {**answer.body, "secret": secret}).response()


@router.get("", responses=declare("validation_error"))
async def list_webhook_endpoints(
    parts: PartsDep, caller: WebhooksWriter, limit: Limit = 20, cursor: str | None = None
) -> WebhookEndpointPage:
    """The tenant's endpoints, newest first."""
    before = read_cursor(cursor, parts.keyring) if cursor is not None else None
    async with parts.database.read() as session:
        found = await repository.endpoints_page(session, caller.tenant.id, before=before, limit=limit + 1)
    rows, next_cursor = cut(found, limit, parts.keyring)
    return WebhookEndpointPage(data=list(map(_show, rows)), has_more=next_cursor is not None, next_cursor=next_cursor)


@router.get("/{endpoint_id}", responses=declare("not_found"))
async def get_webhook_endpoint(endpoint_id: str, parts: PartsDep, caller: WebhooksWriter) -> WebhookEndpoint:
    """One endpoint, and whether it works."""
    async with parts.database.read() as session:
        return _show(await _found(session, caller.tenant.id, endpoint_id))


@router.patch("/{endpoint_id}", responses=declare("bad_request", "body_too_large", "not_found", "validation_error"))
async def change_webhook_endpoint(
    endpoint_id: str, change: WebhookEndpointChange, parts: PartsDep, caller: WebhooksWriter
) -> WebhookEndpoint:
    """Change what is given; `enabled` stops it, or lets it be told again."""
    if change.url is not None:
        _check(change.url, parts)
    async with parts.database.write() as session:
        row = await _found(session, caller.tenant.id, endpoint_id, locked=True)
        row.url = row.url if change.url is None else change.url
        row.types = row.types if change.types is None else sorted(set(change.types))
        row.description = row.description if change.description is None else change.description
        if change.enabled is True:
            row.disabled_at = row.disabled_because = row.failing_since = None
        elif change.enabled is False and row.disabled_at is None:
            await delivery.disable(session, row, "its owner disabled it", at=clock.now())
        return _show(row)


@router.delete("/{endpoint_id}", status_code=204, responses=declare("not_found"))
async def delete_webhook_endpoint(endpoint_id: str, parts: PartsDep, caller: WebhooksWriter) -> None:
    """Forget an endpoint and the log of its deliveries."""
    async with parts.database.write() as session:
        await session.delete(await _found(session, caller.tenant.id, endpoint_id, locked=True))


@router.post("/{endpoint_id}/rotate-secret", responses=declare("not_found"))
async def rotate_webhook_secret(endpoint_id: str, parts: PartsDep, caller: WebhooksWriter) -> WebhookEndpoint:
    """Make a new secret, which the answer holds. For a day messages carry a signature by the old one, too."""
    secret, now = signing.new_secret(), clock.now()
    async with parts.database.write() as session:
        row = await _found(session, caller.tenant.id, endpoint_id, locked=True)
        row.old_secret, row.old_secret_until = row.secret, now + OLD_SECRET_SIGNS_FOR
        row.secret = parts.keyring.encrypt(secret)
        return _show(row).model_copy(update={"secret": secret})


@router.post("/{endpoint_id}/ping", status_code=202, responses=declare("not_found", "webhook_endpoint_disabled"))
async def ping_webhook_endpoint(endpoint_id: str, parts: PartsDep, caller: WebhooksWriter) -> WebhookDelivery:
    """Send a message of the type `webhook.ping`, whatever types the endpoint wants."""
    now = clock.now()
    async with parts.database.write() as session:
        row = _enabled(await _found(session, caller.tenant.id, endpoint_id, locked=True))
        data = {"object": "webhook_endpoint", "id": row.id}
        ping = messages.write(session, caller.tenant.id, messages.PING, data, at=now)
        ping.spread_at = now  # it is for this endpoint alone
        await session.flush()
        return _show_delivery(delivery.address(session, ping, row, at=now))


@router.get("/{endpoint_id}/deliveries", responses=declare("not_found", "validation_error"))
async def list_webhook_deliveries(
    endpoint_id: str, parts: PartsDep, caller: WebhooksWriter, limit: Limit = 20, cursor: str | None = None
) -> WebhookDeliveryPage:
    """What the endpoint was told in the last 30 days and how that went, newest first."""
    before = read_cursor(cursor, parts.keyring) if cursor is not None else None
    async with parts.database.read() as session:
        row = await _found(session, caller.tenant.id, endpoint_id)
        found = await repository.deliveries_page(session, row.id, before=before, limit=limit + 1)
    rows, next_cursor = cut(found, limit, parts.keyring)
    data = list(map(_show_delivery, rows))
    return WebhookDeliveryPage(data=data, has_more=next_cursor is not None, next_cursor=next_cursor)


@router.post(
    "/{endpoint_id}/deliveries/{delivery_id}/resend",
    status_code=202,
    responses=declare("not_found", "webhook_endpoint_disabled"),
)
async def resend_webhook_delivery(
    endpoint_id: str, delivery_id: str, parts: PartsDep, caller: WebhooksWriter
) -> WebhookDelivery:
    """Send a message again, now, under the same id, with the whole schedule of retries before it."""
    async with parts.database.write() as session:
        row = _enabled(await _found(session, caller.tenant.id, endpoint_id, locked=True))
        found = await repository.find_delivery(session, row.id, delivery_id)
        if found is None:
            raise ProblemError("not_found", f"there is no delivery {delivery_id} to {endpoint_id}")
        found.status, found.round, found.due_at = "pending", 0, clock.now()
        return _show_delivery(found)


def _check(url: str, parts: Parts) -> None:
    settings = parts.settings.webhooks
    try:
        connect.check_url(url, allow_http=settings.allow_http, allowed=settings.allow_networks)
    except connect.RefusedError as refused:
        raise at("/url", "validation_error", f"this address is refused: {refused}") from refused


async def _found(session: AsyncSession, tenant_id: str, endpoint_id: str, *, locked: bool = False) -> EndpointRow:
    row = await repository.find(session, tenant_id, endpoint_id, locked=locked)
    if row is None:
        raise ProblemError("not_found", f"there is no webhook endpoint {endpoint_id}")
    return row


def _enabled(row: EndpointRow) -> EndpointRow:
    if row.disabled_at is not None:
        raise ProblemError(
            "webhook_endpoint_disabled",
            f"endpoint {row.id} is disabled: {row.disabled_because}",
            hint='Enable it first: PATCH it with {"enabled": true}.',
        )
    return row


def _show(row: EndpointRow) -> WebhookEndpoint:
    return WebhookEndpoint(
        id=row.id,
        url=row.url,
        types=row.types,
        description=row.description,
        enabled=row.disabled_at is None,
        disabled_at=row.disabled_at,
        disabled_because=row.disabled_because,
        failing_since=row.failing_since,
        created_at=row.created_at,
    )


def _show_delivery(row: DeliveryRow) -> WebhookDelivery:
    return WebhookDelivery.model_validate({
        "id": row.id,
        "endpoint_id": row.endpoint_id,
        "message_id": row.message_id,
        "type": row.type,
        "status": row.status,
        "next_try_at": row.due_at,
        "tries": row.tries,
        "created_at": row.created_at,
    })  # fmt: skip
