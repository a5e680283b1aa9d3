"""The rounds of the scheduler that tell endpoints: spread messages, send what is due, write down how it went.

A delivery is claimed for longer than a try can take, so several schedulers may run, and one that is lost delays a delivery
and no more. A receiver may get a message twice; by its id it can tell.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpcore2
import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from app.kit import clock
from app.kit.db import Database
from app.kit.ids import new_id
from app.kit.keyring import Keyring
from app.kit.retries import next_try, retry_after
from app.settings import WebhooksSettings
from app.webhooks import connect, repository, signing
from app.webhooks.connect import GuardedBackend, RefusedError
from app.webhooks.models import WebhookDelivery, WebhookEndpoint, WebhookMessage
from secateur.problems import ProblemError

MAX_MESSAGES_A_ROUND = 500
MAX_SENT_AT_ONCE = 20
KEEP = timedelta(days=30)
MAX_LOGGED_TRIES = 50

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one try went: a status, or the reason why there is none."""

    status: int | None
    error: str | None
    milliseconds: int
    retry_after: str | None = None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Letter:
    """All that is needed to send a delivery, with no session open."""

    delivery_id: str
    attempt: int
    url: str
    message_id: str
    body: str
    secrets: tuple[str, ...]


async def spread(database: Database, *, at: datetime) -> int:
    """Give new messages to the endpoints that want them; how many messages there were. Old ones are forgotten."""
    async with database.write() as session:
        messages = await repository.unspread(session, MAX_MESSAGES_A_ROUND)
        await _give(session, messages, at=at)
        await repository.forget(session, at, KEEP)
    return len(messages)


async def spread_now(session: AsyncSession, tenant_id: str, *, at: datetime) -> None:
    """Give what waits for the tenant to the endpoints that it has now: one that is made next is told nothing older."""
    await _give(session, await repository.unspread(session, tenant_id=tenant_id), at=at)


async def _give(session: AsyncSession, messages: Iterable[WebhookMessage], *, at: datetime) -> None:
    for message in messages:
        endpoints = await repository.enabled(session, message.tenant_id)
        wanting = [one for one in endpoints if not one.types or message.type in one.types]
        for endpoint in wanting:
            address(session, message, endpoint, at=at)
        message.spread_at = at
        if not wanting:
            await session.delete(message)
    await session.flush()


def address(session: AsyncSession, message: WebhookMessage, endpoint: WebhookEndpoint, *, at: datetime) -> WebhookDelivery:
    """Have the message delivered to the endpoint, at once."""
    delivery = WebhookDelivery(
        id=new_id("whd"),
        endpoint_id=endpoint.id,
        message_id=message.id,
        type=message.type,
        status="pending",
        attempt=0,
        round=0,
        due_at=at,
        tries=[],
        created_at=at,
    )
    session.add(delivery)
    return delivery


async def deliver_due(
    database: Database, keyring: Keyring, settings: WebhooksSettings, *, backend: GuardedBackend | None = None
) -> int:
    """Send what is due, all at once; how many there were."""
    backend = backend or GuardedBackend(settings.allow_networks)
    letters = await _claim(database, keyring, settings, at=clock.now())

    async def see_through(letter: Letter) -> None:
        outcome = await _send(letter, settings, backend)
        log.info("webhook_tried", delivery=letter.delivery_id, status=outcome.status, error=outcome.error)
        async with database.write() as session:
            await _settle(session, letter, outcome, settings, at=clock.now())

    await asyncio.gather(*map(see_through, letters))
    return len(letters)


async def _claim(database: Database, keyring: Keyring, settings: WebhooksSettings, *, at: datetime) -> list[Letter]:
    letters = []
    async with database.write() as session:
        for delivery in await repository.due(session, at, MAX_SENT_AT_ONCE):
            endpoint = await session.get_one(WebhookEndpoint, delivery.endpoint_id)
            message = await session.get_one(WebhookMessage, delivery.message_id)
            delivery.attempt += 1
            delivery.round += 1
            delivery.due_at = at + timedelta(seconds=2 * settings.timeout_seconds + 30)
            try:
                keys = secrets_of(endpoint, keyring, at=at)
            except ProblemError as problem:  # must not be in the way of the others
                delivery.status, delivery.due_at = "failed", None
                _note(delivery, Outcome(status=None, error=problem.detail, milliseconds=0), at=at)
                continue
            body = json.dumps(message.body, separators=(",", ":"), sort_keys=True)
            letters.append(Letter(delivery.id, delivery.attempt, endpoint.url, message.id, body, keys))
    return letters


def secrets_of(endpoint: WebhookEndpoint, keyring: Keyring, *, at: datetime) -> tuple[str, ...]:
    """The secrets that sign now: the present one, and after a rotation the one before for a while."""
    keys = [endpoint.secret]
    if endpoint.old_secret is not None and endpoint.old_secret_until is not None and at < endpoint.old_secret_until:
        keys.append(endpoint.old_secret)
    return tuple(keyring.decrypt(key) for key in keys)


async def _send(letter: Letter, settings: WebhooksSettings, backend: GuardedBackend) -> Outcome:
    signed = signing.headers_of(letter.message_id, letter.body, letter.secrets, at=clock.now())
    headers = {"content-type": "application/json", "user-agent": "secateur-webhooks", **signed}
    began = time.monotonic()

    def after(**facts: Any) -> Outcome:
        return Outcome(milliseconds=round(1000 * (time.monotonic() - began)), **facts)

    try:
        # Settings may have become stricter since the endpoint was made.
        connect.check_url(letter.url, allow_http=settings.allow_http, allowed=settings.allow_networks)
        answer = await connect.post(
            letter.url, letter.body.encode(), headers, backend=backend, seconds=settings.timeout_seconds
        )
    except RefusedError as refused:
        return after(status=None, error=f"the address is refused: {refused}")
    except TimeoutError:
        return after(status=None, error=f"no answer within {settings.timeout_seconds:g} seconds")
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError) as error:
        return after(status=None, error=f"{type(error).__name__}: {error}"[:200])
    return after(status=answer.status, error=None, retry_after=answer.headers.get("retry-after"))


async def _settle(
    session: AsyncSession, letter: Letter, outcome: Outcome, settings: WebhooksSettings, *, at: datetime
) -> None:
    """Write down how the try went, unless a later one has the delivery by now."""
    mine = await repository.attempted(session, letter.delivery_id, letter.attempt)
    if mine is None:
        return
    delivery, endpoint = mine
    _note(delivery, outcome, at=at)
    if outcome.delivered:
        delivery.status, delivery.due_at, endpoint.failing_since = "delivered", None, None
        return
    wanted = retry_after(outcome.retry_after, at=at)
    delivery.due_at = next_try(delivery.round, settings.retry_seconds, at=at, not_before=wanted)
    delivery.status = "pending" if delivery.due_at else "failed"
    endpoint.failing_since = endpoint.failing_since or at
    if outcome.status == 410:
        await disable(session, endpoint, "the receiver answered 410 Gone", at=at)
    elif at - endpoint.failing_since >= timedelta(seconds=settings.disable_after_seconds):
        await disable(session, endpoint, f"no delivery succeeded since {endpoint.failing_since:%Y-%m-%d %H:%M} UTC", at=at)


def _note(delivery: WebhookDelivery, outcome: Outcome, *, at: datetime) -> None:
    told = {"at": at.isoformat(), "status": outcome.status, "error": outcome.error, "milliseconds": outcome.milliseconds}
    delivery.tries = [*delivery.tries, told][-MAX_LOGGED_TRIES:]


async def disable(session: AsyncSession, endpoint: WebhookEndpoint, reason: str, *, at: datetime) -> None:
    """Tell the endpoint nothing more until its owner enables it; what waits for it has failed and can be sent again."""
    endpoint.disabled_at, endpoint.disabled_because = at, reason
    await session.flush()
    await repository.give_up(session, endpoint.id)
