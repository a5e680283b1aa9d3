"""The doorbell: tells workers that there is work on a queue, and no more. The database says which.

A ring may be lost or doubled at no harm: the relay rings again for jobs that go on waiting, and a worker that finds no job
goes back to sleep.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

import structlog
from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.models import Job, OutboxMessage
from app.jobs.states import Status
from app.kit import clock
from app.kit.db import Database
from app.kit.ids import new_id
from secateur.problems import ProblemError

WORK_TASK = "workers.tasks.work"
RING_EXPIRES_SECONDS = 3_600
MAX_OUTBOX_A_ROUND = 1_000
MAX_RINGS_AGAIN = 16
KEEP_SENT = timedelta(hours=1)
_TIMEOUT_SECONDS = 1

log = structlog.get_logger()


class Doorbell:
    """A Celery producer, and nothing else of Celery. Its methods block, for about a second if the broker is away."""

    def __init__(self, broker_url: str) -> None:
        self._celery = Celery("secateur-doorbell", broker=broker_url, set_as_current=False)
        self._celery.conf.update(
            broker_connection_timeout=_TIMEOUT_SECONDS,
            broker_transport_options={
                "socket_connect_timeout": _TIMEOUT_SECONDS,
                "socket_timeout": _TIMEOUT_SECONDS,
                "retry_on_timeout": False,
                "max_retries": 0,
            },
            task_serializer="json",
        )

    def ring(self, queue: str) -> None:
        """Say that there is work on `queue`. Raises `service_unavailable` if the broker is away."""
        try:
            self._celery.send_task(WORK_TASK, queue=queue, ignore_result=True, expires=RING_EXPIRES_SECONDS, retry=False)
        except (BrokerError, OSError) as error:
            raise _away(error) from error

    def check(self) -> None:
        """For readiness: raises `service_unavailable` if the broker does not answer."""
        try:
            with self._celery.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=_TIMEOUT_SECONDS)
        except (BrokerError, OSError) as error:
            raise _away(error) from error

    def close(self) -> None:
        self._celery.close()


def _away(error: Exception) -> ProblemError:
    return ProblemError("service_unavailable", f"the broker does not answer: {type(error).__name__}")


async def ring(database: Database, doorbell: Doorbell, bells: Iterable[tuple[str, str]]) -> int:
    """Ring the doorbells of outbox rows `(id, queue)`, whose transaction is committed; how many were rung.

    If the broker is away that is logged and the rest is left to the relay.
    """
    rung: list[str] = []
    for id_, queue in bells:
        try:
            await asyncio.to_thread(doorbell.ring, queue)
        except ProblemError as problem:
            log.warning("doorbell_not_rung", queue=queue, detail=problem.detail)
            break
        rung.append(id_)
    if rung:
        async with database.write() as session:
            await session.execute(update(OutboxMessage).where(OutboxMessage.id.in_(rung)).values(sent_at=clock.now()))
    return len(rung)


async def relay(database: Database, doorbell: Doorbell, *, at: datetime, ring_again_after: timedelta) -> int:
    """One round: ring what was never rung, and ring again for jobs that have waited longer than `ring_again_after`.

    A queue is rung again at most `MAX_RINGS_AGAIN` times, and not before its last ring is that old. Returns how many rings
    there were. Rows that were sent an hour ago are deleted.
    """
    async with database.write() as session:
        await session.execute(delete(OutboxMessage).where(OutboxMessage.sent_at < at - KEEP_SENT))
        for queue, waiting in (await _unheard(session, at - ring_again_after)).items():
            again = min(waiting, MAX_RINGS_AGAIN)
            session.add_all(OutboxMessage(id=new_id("out"), queue=queue, created_at=at) for _ in range(again))
        await session.flush()
        unsent = select(OutboxMessage).where(OutboxMessage.sent_at.is_(None)).order_by(OutboxMessage.id)
        bells = [(row.id, row.queue) for row in await session.scalars(unsent.limit(MAX_OUTBOX_A_ROUND))]
    return await ring(database, doorbell, bells)


async def _unheard(session: AsyncSession, before: datetime) -> Mapping[str, int]:
    """How many jobs have waited since `before`, by queue; queues with a ring since then, or one to come, are left out."""
    rung = select(OutboxMessage.queue).where(or_(OutboxMessage.sent_at.is_(None), OutboxMessage.sent_at >= before))
    waiting = select(Job.queue).where(Job.status == Status.QUEUED, Job.queued_at < before, Job.queue.not_in(rung))
    return Counter(await session.scalars(waiting))
