"""`/livez` and `/readyz`: alive is not ready, and what is down is named."""

from __future__ import annotations

import asyncio
import time

from httpx2 import AsyncClient

from app import health
from app.kit.migrations import downgrade
from app.settings import BrokerSettings, Settings
from tests.api.conftest import Service, serve
from tests.servers import free_port


async def test_a_service_whose_parts_work_is_ready(service: Service) -> None:
    async with AsyncClient(base_url=service.client.base_url) as client:
        for path in ("/livez", "/readyz"):
            response = await client.get(path)
            assert (response.status_code, response.json()) == (200, {"status": "ok"}), response.text


async def test_what_is_down_is_named_and_the_service_lives_on(settings: Settings) -> None:
    await asyncio.to_thread(downgrade, settings.database_url, "base")
    broken = settings.model_copy(update={"broker": BrokerSettings(url=f"redis://:password@127.0.0.1:{free_port()}/0")})
    async with serve(broken) as url, AsyncClient(base_url=url) as client:
        assert (await client.get("/livez")).status_code == 200
        started = time.monotonic()
        response = await client.get("/readyz")
        assert time.monotonic() - started < health.CHECK_SECONDS + 1
    assert (response.status_code, response.json()["code"]) == (503, "service_unavailable")
    assert "database: the database is at revision none" in response.json()["detail"]
    assert "broker: the broker does not answer" in response.json()["detail"]
    assert "store" not in response.json()["detail"]
    assert "password" not in response.text


async def test_parts_are_asked_once_for_many_who_want_to_know(service: Service) -> None:
    asked = 0

    async def check() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.05)

    readiness = health.Readiness({"part": check})
    assert await asyncio.gather(*(readiness.down() for _ in range(10))) == [[]] * 10
    assert asked == 1


async def test_a_part_that_never_answers_is_down() -> None:
    readiness = health.Readiness({"part": lambda: asyncio.sleep(60)}, seconds=0.05)
    assert await readiness.down() == ["part: no answer within 0.05 seconds"]
