"""The doorbell: tells workers that there is work on a queue, and no more. The database says which.

A ring may be lost or doubled at no harm: the relay rings again for jobs that go on waiting, and a worker that finds no job
goes back to sleep.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

import structlog
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.models import Job, OutboxMessage
from app.jobs.states import Status
from app.kit.db import Database
from app.kit.ids import new_id
from secateur.problems import ProblemError

WORK_TASK = "workers.tasks.work"
# A message that nobody took for so many pauses between rings is dropped by whoever takes it. More than one, since the clocks
# of two machines differ and the relay has a pace of its own.
RING_LASTS = 2
MIN_RING_LASTS = timedelta(minutes=1)
MAX_OUTBOX_A_ROUND = 1_000
MAX_RINGS_AGAIN = 16
KEEP_SENT = timedelta(hours=1)
_RELAY_LOCK = 0x5EC47E02  # of PostgreSQL's advisory locks: one relay at a time counts what is unheard
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

    def ring(self, queue: str, *, ring_again_after: timedelta) -> None:
        """Say that there is work on `queue`; the message is void some time after it would be rung again.

        Raises `service_unavailable` if the broker is away.
        """
        expires = max(RING_LASTS * ring_again_after, MIN_RING_LASTS).total_seconds()
        try:
            self._celery.send_task(WORK_TASK, queue=queue, ignore_result=True, expires=expires, retry=False)
        except (BrokerError, OSError) as error:
            raise _away(error) from error

    def silence(self, queue: str) -> None:
        """Forget the rings of `queue` that nobody has heard. Raises as `ring` does."""
        try:
            with self._celery.connection_for_write() as connection:
                Queue(queue).bind(connection.default_channel).purge()
        except (BrokerError, OSError) as error:
            raise _away(error) from error

    def workers(self) -> dict[str, list[str]]:
        """The workers that answer within a second, by name, with the queues that they serve. Raises as `ring` does."""
        try:
            answers = self._celery.control.inspect(timeout=_TIMEOUT_SECONDS).active_queues() or {}
        except (BrokerError, OSError) as error:
            raise _away(error) from error
        return {name: [queue["name"] for queue in queues] for name, queues in answers.items()}

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


async def ring(
    database: Database, doorbell: Doorbell, ids: Collection[str], *, at: datetime, ring_again_after: timedelta
) -> int:
    """Ring the doorbells of outbox rows, whose transaction is committed; how many were rung.

    Each row is claimed first, so that whoever else rings leaves it alone. If the broker is away that is logged, and what was
    not rung is left to the relay.
    """
    mine = update(OutboxMessage).where(OutboxMessage.id.in_(ids), OutboxMessage.sent_at.is_(None)).values(sent_at=at)
    async with database.write() as session:
        claimed = (await session.execute(mine.returning(OutboxMessage.id, OutboxMessage.queue))).all()
    return await _ring_claimed(database, doorbell, [(row.id, row.queue) for row in claimed], ring_again_after)


async def _ring_claimed(
    database: Database, doorbell: Doorbell, claimed: Sequence[tuple[str, str]], ring_again_after: timedelta
) -> int:
    for rung, (_, queue) in enumerate(claimed):
        try:
            await asyncio.to_thread(doorbell.ring, queue, ring_again_after=ring_again_after)
        except ProblemError as problem:
            log.warning("doorbell_not_rung", queue=queue, detail=problem.detail)
            left = [id_ for id_, _ in claimed[rung:]]
            async with database.write() as session:
                await session.execute(update(OutboxMessage).where(OutboxMessage.id.in_(left)).values(sent_at=None))
            return rung
    return len(claimed)


async def relay(database: Database, doorbell: Doorbell, *, at: datetime, ring_again_after: timedelta) -> int:
    """One round: ring what was never rung, and ring again for jobs that have waited longer than `ring_again_after`.

    A queue is rung again at most `MAX_RINGS_AGAIN` times, in place of all rings before, and not before its last one is that
    old: rings do not pile up where no worker is. Several relays may run at once. Returns how many rings there were. Rows
    that were sent an hour ago are deleted.
    """
    async with database.write() as session:
        if not database.is_sqlite:  # where writers queue anyway
            await session.execute(select(func.pg_advisory_xact_lock(_RELAY_LOCK)))
        await session.execute(delete(OutboxMessage).where(OutboxMessage.sent_at < at - KEEP_SENT))
        unheard = await _unheard(session, at - ring_again_after)
        counts = {queue: min(waiting, MAX_RINGS_AGAIN) for queue, waiting in unheard.items()}
        again = [(new_id("out"), queue) for queue, count in counts.items() for _ in range(count)]
        # Claimed from the start: nobody else rings them, and so not before the silence.
        session.add_all(OutboxMessage(id=id_, queue=queue, created_at=at, sent_at=at) for id_, queue in again)
        unsent = select(OutboxMessage.id).where(OutboxMessage.sent_at.is_(None)).order_by(OutboxMessage.id)
        ids = (await session.scalars(unsent.limit(MAX_OUTBOX_A_ROUND))).all()
    with suppress(ProblemError):  # the next lines tell that the broker is away
        for queue in unheard:
            await asyncio.to_thread(doorbell.silence, queue)
    rung = await _ring_claimed(database, doorbell, again, ring_again_after)
    return rung + await ring(database, doorbell, ids, at=at, ring_again_after=ring_again_after)


async def _unheard(session: AsyncSession, before: datetime) -> Mapping[str, int]:
    """How many jobs have waited since `before`, by queue; queues with a ring since then, or one to come, are left out."""
    rung = select(OutboxMessage.queue).where(or_(OutboxMessage.sent_at.is_(None), OutboxMessage.sent_at >= before))
    waiting = select(Job.queue).where(Job.status == Status.QUEUED, Job.queued_at < before, Job.queue.not_in(rung))
    return Counter(await session.scalars(waiting))
