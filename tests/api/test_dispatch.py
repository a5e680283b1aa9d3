"""The doorbell: what was not rung is rung later, nobody waits long for a broker that is away, and rings do not pile up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis
from sqlalchemy import select

from app.jobs import dispatch
from app.jobs.dispatch import MAX_RINGS_AGAIN, WORK_TASK, Doorbell, relay
from app.jobs.models import OutboxMessage
from app.kit import clock
from app.kit.db import Database
from secateur.problems import ProblemError
from tests.api.jobs import make_job, make_tenant
from tests.servers import free_port, serve_valkey

AGAIN = timedelta(seconds=30)


@pytest.fixture
def broker(broker_url: str) -> Redis:
    """The broker, with no message in it."""
    broker = Redis.from_url(broker_url)
    broker.flushall()
    return broker


def rings(broker: Redis, queue: str = "cpu") -> int:
    return int(broker.llen(queue))


async def unsent(database: Database) -> int:
    async with database.read() as session:
        return len((await session.scalars(select(OutboxMessage).where(OutboxMessage.sent_at.is_(None)))).all())


def test_a_ring_is_a_message_for_the_workers_task(broker: Redis, broker_url: str) -> None:
    doorbell = Doorbell(broker_url)
    doorbell.ring("gpu", ring_again_after=AGAIN)
    doorbell.check()
    doorbell.close()
    assert rings(broker, "gpu") == 1
    assert f'"task": "{WORK_TASK}"'.encode() in broker.lrange("gpu", 0, 0)[0]


def test_a_broker_that_refuses_or_never_answers_costs_two_seconds_at_most() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (free_port(), silent.getsockname()[1]):
            doorbell = Doorbell(f"redis://127.0.0.1:{port}/0")
            for action in (doorbell.check, lambda doorbell=doorbell: doorbell.ring("cpu", ring_again_after=AGAIN)):
                assert any(seconds_of_refusal(action) < 2.5 for _ in range(3))  # noise only ever adds
            doorbell.close()


def seconds_of_refusal(action: Callable[[], None]) -> float:
    started = time.monotonic()
    with pytest.raises(ProblemError) as problem:
        action()
    assert problem.value.code == "service_unavailable"
    return time.monotonic() - started


class SilentDoorbell(Doorbell):
    """Its broker does not answer, until the test has seen enough."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1/0")
        self.enough = threading.Event()

    def ring(self, queue: str, *, ring_again_after: timedelta) -> None:
        self.enough.wait(30)
        raise ProblemError("service_unavailable", f"nobody rang in {queue} for {ring_again_after}")


async def test_the_loop_goes_on_while_a_ring_waits_for_the_broker(database: Database) -> None:
    await make_job(database, await make_tenant(database))
    async with database.read() as session:
        ids = (await session.scalars(select(OutboxMessage.id))).all()
    doorbell = SilentDoorbell()
    ringing = asyncio.create_task(dispatch.ring(database, doorbell, ids, at=clock.now(), ring_again_after=AGAIN))
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert not ringing.done()
    doorbell.enough.set()
    assert await ringing == 0
    assert await unsent(database) == 1
    doorbell.close()


async def test_the_relay_rings_what_was_not_rung_and_only_once(database: Database, broker: Redis, broker_url: str) -> None:
    tenant = await make_tenant(database)
    for _ in range(20):
        await make_job(database, tenant)
    doorbell = Doorbell(broker_url)
    assert await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN) == 20
    assert rings(broker) == 20
    assert await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN) == 0
    assert rings(broker) == 20
    doorbell.close()


async def test_what_could_not_be_rung_is_rung_when_the_broker_is_back(database: Database) -> None:
    await make_job(database, await make_tenant(database))
    port = free_port()
    doorbell = Doorbell(f"redis://127.0.0.1:{port}/0")
    assert await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN) == 0
    assert await unsent(database) == 1
    with serve_valkey(port) as url:
        assert await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN) == 1
        assert rings(Redis.from_url(url)) == 1
        assert await unsent(database) == 0
        doorbell.close()


async def test_jobs_that_wait_long_are_rung_again_but_rings_do_not_pile_up(
    database: Database, broker: Redis, broker_url: str
) -> None:
    tenant = await make_tenant(database)
    for _ in range(MAX_RINGS_AGAIN + 4):
        await make_job(database, tenant, at=clock.now() - timedelta(hours=1))
    doorbell = Doorbell(broker_url)
    await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN)
    broker.flushall()  # every message is lost
    assert await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN) == 0
    later = clock.now() + 2 * AGAIN
    assert await relay(database, doorbell, at=later, ring_again_after=AGAIN) == MAX_RINGS_AGAIN
    assert rings(broker) == MAX_RINGS_AGAIN
    assert await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN) == 0
    doorbell.close()


async def test_two_relays_at_once_ring_once(database: Database, broker: Redis, broker_url: str) -> None:
    tenant, begin = await make_tenant(database), clock.now()
    for _ in range(20):
        await make_job(database, tenant, at=begin)
    doorbells = [Doorbell(broker_url) for _ in range(3)]
    for at, rung in ((begin, 20), (begin + 2 * AGAIN, MAX_RINGS_AGAIN)):  # in place of the first twenty
        await asyncio.gather(*(relay(database, doorbell, at=at, ring_again_after=AGAIN) for doorbell in doorbells))
        assert rings(broker) == rung
    for doorbell in doorbells:
        doorbell.close()


async def test_behind_a_long_job_only_the_newest_rings_count(database: Database, broker: Redis, broker_url: str) -> None:
    """Ten minutes of rounds: what is rung again replaces what has expired, and the worker drops that unread."""
    tenant, begin = await make_tenant(database), clock.now()
    for _ in range(MAX_RINGS_AGAIN + 4):
        await make_job(database, tenant, at=begin)
    doorbell = Doorbell(broker_url)
    rung = [await relay(database, doorbell, at=begin + timedelta(seconds=2 * i), ring_again_after=AGAIN) for i in range(300)]
    assert sum(rung) == 20 + MAX_RINGS_AGAIN * (600 // 32)
    assert rings(broker) == MAX_RINGS_AGAIN
    lasts = [
        datetime.fromisoformat(json.loads(message)["headers"]["expires"]) - begin for message in broker.lrange("cpu", 0, -1)
    ]
    assert timedelta(seconds=59) < min(lasts) <= max(lasts) < timedelta(seconds=120)
    doorbell.close()


async def test_a_queue_without_waiting_jobs_is_left_in_peace(database: Database, broker: Redis, broker_url: str) -> None:
    tenant = await make_tenant(database)
    old = datetime(2026, 1, 1, tzinfo=UTC)
    await make_job(database, tenant, at=old, status="running")
    doorbell = Doorbell(broker_url)
    await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN)
    broker.flushall()
    assert await relay(database, doorbell, at=clock.now() + 2 * AGAIN, ring_again_after=AGAIN) == 0
    doorbell.close()


async def test_doorbells_rung_long_ago_are_forgotten(database: Database, broker: Redis, broker_url: str) -> None:
    await make_job(database, await make_tenant(database), status="cancelled")
    doorbell = Doorbell(broker_url)
    await relay(database, doorbell, at=clock.now(), ring_again_after=AGAIN)
    await relay(database, doorbell, at=clock.now() + timedelta(hours=2), ring_again_after=AGAIN)
    async with database.read() as session:
        assert (await session.scalars(select(OutboxMessage))).all() == []
    assert rings(broker) == 1
    doorbell.close()
