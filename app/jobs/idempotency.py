"""`Idempotency-Key`: the same request twice does its work once, and is answered the same twice.

The record is written in the transaction of the work itself, so either both are there or neither. A request that fails
leaves no record and can be sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import Header
from fastapi.responses import JSONResponse
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.models import IdempotencyRecord
from app.kit.db import Database
from secateur.problems import ProblemError

KEPT_FOR = timedelta(hours=24)

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Any text that names this request. Sent again within a day, the first answer is repeated.",
    ),
]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered."""

    status: int
    headers: dict[str, Any]
    body: dict[str, Any]

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


@dataclass(frozen=True, slots=True)
class Intent:
    """A request that must not be done twice: whose it is, its key, and what it asks for."""

    tenant_id: str
    key: str
    digest: str


def intent_of(tenant_id: str, key: str | None, *asked: str) -> Intent | None:
    """The intent of a request with a key; `asked` is all that tells it from another request."""
    digest = hashlib.sha256("\0".join(asked).encode()).hexdigest()
    return Intent(tenant_id, key, digest) if key is not None else None


async def first_answer(database: Database, intent: Intent | None, *, at: datetime) -> Answer | None:
    """What the same request was answered before, marked as repeated; None if it is the first.

    Raises `idempotency_key_reused` if the key was used for another request.
    """
    if intent is None:
        return None
    async with database.read() as session:
        record = await session.scalar(
            select(IdempotencyRecord).where(
                IdempotencyRecord.tenant_id == intent.tenant_id,
                IdempotencyRecord.key == intent.key,
                IdempotencyRecord.expires_at > at,
            )
        )
    if record is None:
        return None
    if record.request_digest != intent.digest:
        raise ProblemError(
            "idempotency_key_reused",
            f"the idempotency key {intent.key!r} was used for another request",
            hint="Use a new key for a new request; a key is for repeating the very same one.",
        )
    return Answer(record.status, {**record.headers, "Idempotent-Replayed": "true"}, record.body)


async def once(
    database: Database, intent: Intent | None, work: Callable[[AsyncSession], Awaitable[Answer]], *, at: datetime
) -> Answer:
    """Do the work and write down its answer, in one transaction that is committed when this returns.

    If the same request is doing so at the same time, the slower one is undone and gets the answer of the faster one.
    """
    try:
        async with database.write() as session:
            answer = await work(session)
            if intent is not None:
                await _keep(session, intent, answer, at)
    except IntegrityError:
        earlier = await first_answer(database, intent, at=at)
        if earlier is None:
            raise
        return earlier
    return answer


async def _keep(session: AsyncSession, intent: Intent, answer: Answer, at: datetime) -> None:
    outdated = (
        IdempotencyRecord.tenant_id == intent.tenant_id,
        IdempotencyRecord.key == intent.key,
        IdempotencyRecord.expires_at <= at,
    )
    await session.execute(delete(IdempotencyRecord).where(*outdated))
    session.add(
        IdempotencyRecord(
            tenant_id=intent.tenant_id,
            key=intent.key,
            request_digest=intent.digest,
            status=answer.status,
            headers=answer.headers,
            body=answer.body,
            expires_at=at + KEPT_FOR,
        )
    )
    await session.flush()
