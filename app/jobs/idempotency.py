"""`Idempotency-Key`: the same request twice does its work once, and is answered the same twice.

The key is reserved before the work is begun, and the answer is written in the transaction of the work itself, so either both
are there or neither. A request that fails leaves no record and can be sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import Header
from fastapi.responses import JSONResponse
from sqlalchemy import ColumnElement, delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.models import IdempotencyRecord
from app.kit.db import Database
from app.kit.ids import new_id
from secateur.problems import ProblemError

KEPT_FOR = timedelta(hours=24)
# After so long the same request may be begun again; if the first one is still at work, it is undone in the end.
IN_FLIGHT_FOR = timedelta(seconds=10)

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
    """A request that must not be done twice: whose it is, its key, and what it asks for; `holder` is this sending of it."""

    tenant_id: str
    key: str
    digest: str
    holder: str = field(default_factory=lambda: new_id("req"))


def intent_of(tenant_id: str, key: str | None, *asked: str) -> Intent | None:
    """The intent of a request with a key; `asked` is all that tells it from another request."""
    digest = hashlib.sha256("\0".join(asked).encode()).hexdigest()
    return Intent(tenant_id, key, digest) if key is not None else None


@asynccontextmanager
async def reserved(database: Database, intent: Intent | None, *, at: datetime) -> AsyncIterator[Answer | None]:
    """Hold the key while the block does the work: None, or what the same request was answered before, marked as repeated.

    Raises `idempotency_key_reused` if the key was used for another request, and `idempotency_key_in_flight` if the same one
    is being done. The key is free again if the block raises, and `IN_FLIGHT_FOR` after a process was killed in it.
    """
    if intent is None:
        yield None
        return
    earlier = await _reserve(database, intent, at)
    try:
        yield earlier
    except BaseException:
        if earlier is None:
            async with database.write() as session:
                await session.execute(delete(IdempotencyRecord).where(*_held_by(intent)))
        raise


async def once(
    database: Database, intent: Intent | None, work: Callable[[AsyncSession], Awaitable[Answer]], *, at: datetime
) -> Answer:
    """Do the work and write down its answer, in one transaction that is committed when this returns.

    Inside of `reserved`. Raises `idempotency_key_in_flight`, and undoes the work, if that took so long that the same request
    was begun again.
    """
    async with database.write() as session:
        answer = await work(session)
        if intent is not None:
            kept = {"status": answer.status, "headers": answer.headers, "body": answer.body, "expires_at": at + KEPT_FOR}
            mine = update(IdempotencyRecord).where(*_held_by(intent)).values(**kept)
            if await session.scalar(mine.returning(IdempotencyRecord.key)) is None:
                raise _in_flight(intent)
    return answer


async def _reserve(database: Database, intent: Intent, at: datetime) -> Answer | None:
    try:
        async with database.write() as session:
            record = await session.get(IdempotencyRecord, (intent.tenant_id, intent.key), with_for_update=True)
            if record is not None and record.expires_at > at:
                return _answer_of(record, intent)
            if record is None:
                record = IdempotencyRecord(tenant_id=intent.tenant_id, key=intent.key)
                session.add(record)
            record.request_digest, record.holder, record.status = intent.digest, intent.holder, None
            record.headers, record.body, record.expires_at = {}, {}, at + IN_FLIGHT_FOR
    except IntegrityError:  # another one was faster by a moment
        raise _in_flight(intent) from None
    return None


def _answer_of(record: IdempotencyRecord, intent: Intent) -> Answer:
    if record.request_digest != intent.digest:
        raise ProblemError(
            "idempotency_key_reused",
            f"the idempotency key {intent.key!r} was used for another request",
            hint="Use a new key for a new request; a key is for repeating the very same one.",
        )
    if record.status is None:
        raise _in_flight(intent)
    return Answer(record.status, {**record.headers, "Idempotent-Replayed": "true"}, record.body)


def _held_by(intent: Intent) -> tuple[ColumnElement[bool], ...]:
    return (
        IdempotencyRecord.tenant_id == intent.tenant_id,
        IdempotencyRecord.key == intent.key,
        IdempotencyRecord.holder == intent.holder,
        IdempotencyRecord.status.is_(None),
    )


def _in_flight(intent: Intent) -> ProblemError:
    told = f"a request with the idempotency key {intent.key!r} is being done"
    return ProblemError("idempotency_key_in_flight", told, hint="Send it again in a few seconds, for its answer.")
