"""What must happen again and again, whoever is busy: ring doorbells that were not heard, reap jobs that were lost, see which
workers are there, tell webhook endpoints, hand finished models on, and take away what is not needed any more.

A loop and not a Celery schedule: it has to go on while the broker is away. Several may run at once; each row is moved once.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from datetime import timedelta

import structlog

from app.artifacts.gc import collect
from app.artifacts.store import open_store
from app.jobs import presence
from app.jobs.dispatch import Doorbell, relay
from app.jobs.reaper import reap
from app.jobs.retention import expire_files
from app.kit import clock, logs
from app.kit.db import Database, moment
from app.kit.keyring import load_keyring
from app.settings import Settings
from app.webhooks.delivery import deliver_due, spread
from workers import integrations
from workers.tidying import tidy

log = structlog.get_logger()


async def run(settings: Settings) -> None:
    """Run all rounds for ever, each at its own pace, until cancelled."""
    database = Database(settings.database_url, pool_size=5)
    doorbell = Doorbell(settings.broker.url)

    async def relay_outbox() -> None:
        await relay(
            database, doorbell, at=clock.now(), ring_again_after=timedelta(seconds=settings.scheduler.ring_again_seconds)
        )

    async def reap_lost_jobs() -> None:
        async with database.write() as session:
            await reap(session, at=await moment(session), max_barren_attempts=settings.worker.max_barren_attempts)

    async def look_for_workers() -> None:
        answers = await asyncio.to_thread(doorbell.workers)
        async with database.write() as session:
            await presence.note(session, answers, at=clock.now())

    async def expire() -> None:
        async with database.write() as session:
            await expire_files(session, at=await moment(session))

    async def collect_store() -> None:
        await asyncio.to_thread(tidy, settings, at=clock.now())
        async with open_store(settings.store_url, endpoint=settings.store.endpoint) as store:
            await collect(database, store, at=clock.now(), grace=timedelta(seconds=settings.retention.grace_seconds))

    async def tell_endpoints() -> None:
        await spread(database, at=clock.now())
        await deliver_due(database, load_keyring(settings.keyring_file), settings.webhooks)

    async def hand_models_on() -> None:
        await integrations.deliver_due(database, settings)

    try:
        async with asyncio.TaskGroup() as rounds:
            rounds.create_task(_every(settings.webhooks.round_seconds, tell_endpoints))
            for _ in range(settings.integrations.parallel):
                rounds.create_task(_every(settings.integrations.round_seconds, hand_models_on))
            rounds.create_task(_every(settings.scheduler.relay_seconds, relay_outbox))
            rounds.create_task(_every(settings.scheduler.reap_seconds, reap_lost_jobs))
            rounds.create_task(_every(settings.scheduler.presence_seconds, look_for_workers))
            rounds.create_task(_every(settings.retention.collect_seconds / 10, expire))
            rounds.create_task(_every(settings.retention.collect_seconds, collect_store))
    finally:
        await database.close()


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except Exception:
            # A database or broker that is away comes back; the next round tries again.
            log.exception("scheduler_round_failed")
        await asyncio.sleep(seconds)


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    logs.configure()

    async def until_told() -> None:
        loop = asyncio.get_running_loop()
        rounds = asyncio.create_task(run(Settings()))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, rounds.cancel)
        await asyncio.wait({rounds})

    asyncio.run(until_told())


if __name__ == "__main__":
    main()
