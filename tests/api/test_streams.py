"""A job's events as a stream: complete, in order, resumable, bounded, and over when they are over."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from app.accounts.models import ApiKey
from app.jobs import broadcaster, claims, repository
from app.jobs.events import LogLine
from app.jobs.models import Job
from app.kit import clock, sse
from app.kit.db import Database
from app.settings import HttpSettings, Settings
from secateur import AsyncClient, Client
from secateur.errors import NotFoundError
from tests.api.conftest import Service, serve_with_tenant
from tests.api.jobs import body, make_job, make_key, make_tenant
from tests.api.models import write_model
from tests.api.test_process import run_api
from tests.api.work import claim, fail
from tests.cutting_proxy import cutting_proxy

STREAM = {"Accept": sse.MEDIA_TYPE}


@asynccontextmanager
async def stream(client: httpx2.AsyncClient, job_id: str, **headers: str) -> AsyncIterator[httpx2.Response]:
    async with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM | headers, timeout=10) as response:
        yield response


async def ids_of(response: httpx2.Response) -> list[int]:
    """The numbers of the events on a stream that ends."""
    return [int(line[4:]) async for line in response.aiter_lines() if line.startswith("id: ")]


async def follow(service: Service, job_id: str, **headers: str) -> list[int]:
    async with stream(service.client, job_id, **headers) as response:
        return await ids_of(response)


async def log(service: Service, job: Job, messages: Sequence[str]) -> None:
    lines = [LogLine("info", message) for message in messages]
    async with service.database.write() as session:
        assert await claims.record(session, job.id, job.attempt, stage=None, progress=None, logs=lines, at=clock.now())


async def end(service: Service, job: Job) -> None:
    results: dict[str, Any] = {"metrics": {}, "report": {}, "artifacts": []}
    async with service.database.write() as session:
        assert await claims.succeed(session, job.id, job.attempt, **results, at=clock.now())


async def test_a_stream_tells_what_was_and_what_happens_and_ends_with_the_job(service: Service) -> None:
    await make_job(service.database, service.tenant)
    job = await claim(service)
    early, late = (asyncio.create_task(follow(service, job.id, **{"Last-Event-ID": seq})) for seq in ("0", "1"))
    for number in range(5):
        await asyncio.sleep(0.15)
        await log(service, job, [f"line {number}"])
    await end(service, job)
    assert await asyncio.wait_for(early, 30) == list(range(1, 9))
    assert await asyncio.wait_for(late, 30) == list(range(2, 9))


async def test_each_event_is_what_the_list_has(service: Service) -> None:
    job_id = await fail(service, {"detail": "no room", "code": "disk_full"})
    listed = (await service.client.get(f"/v1/jobs/{job_id}/events")).json()["data"]
    async with stream(service.client, job_id) as response:
        assert response.headers["content-type"].startswith(sse.MEDIA_TYPE)
        text = (await response.aread()).decode()
    head, *frames = text.removesuffix("\n\n").split("\n\n")
    assert head.startswith("retry: ")
    fields = [dict(line.split(": ", 1) for line in frame.split("\n")) for frame in frames]
    assert [json.loads(each["data"]) for each in fields] == listed
    assert [(int(each["id"]), each["event"]) for each in fields] == [(each["seq"], each["type"]) for each in listed]


async def test_more_events_than_a_page_come_before_and_during(service: Service) -> None:
    await make_job(service.database, service.tenant)
    job = await claim(service)
    await log(service, job, ["before"] * 1_200)
    following = asyncio.create_task(follow(service, job.id))
    await asyncio.sleep(0.5)
    await log(service, job, ["during"] * 900)
    await end(service, job)
    assert await asyncio.wait_for(following, 20) == list(range(1, 2_104))


async def test_nothing_is_left_of_a_job_that_has_ended(service: Service) -> None:
    job_id = await fail(service, {"detail": "no room", "code": "disk_full"})
    last = (await service.client.get(f"/v1/jobs/{job_id}/events")).json()["data"][-1]["seq"]
    async with stream(service.client, job_id, **{"Last-Event-ID": str(last)}) as response:
        assert response.status_code == 204
    assert await follow(service, job_id, **{"Last-Event-ID": str(last - 1)}) == [last]


async def test_who_prefers_json_gets_the_list(service: Service) -> None:
    job = await make_job(service.database, service.tenant)
    for accept in ("*/*", "application/json, text/event-stream;q=0.5", "text/event-stream;q=0"):
        answer = await service.client.get(f"/v1/jobs/{job.id}/events", headers={"Accept": accept})
        assert len(answer.json()["data"]) == 1


async def test_a_stream_where_nothing_happens_has_a_heartbeat(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcaster, "HEARTBEAT_SECONDS", 0.1)
    job = await make_job(service.database, service.tenant)
    async with stream(service.client, job.id) as response:
        beats = 0
        async with asyncio.timeout(5):
            async for line in response.aiter_lines():
                beats += line == ":"
                if beats == 3:
                    break


async def test_strangers_and_nobody_see_no_stream(service: Service) -> None:
    job = await make_job(service.database, service.tenant)
    key = await make_key(service.database, await make_tenant(service.database), service.keyring)
    async with service.client_with(key) as stranger, stream(stranger, job.id) as response:
        assert response.status_code == 404
    async with stream(service.client, "job_nothing") as response:
        assert response.status_code == 404


async def test_a_revoked_key_closes_its_streams_and_no_others(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcaster, "CHECK_KEYS_SECONDS", 0.2)
    job = await make_job(service.database, service.tenant)
    key = await make_key(service.database, service.tenant, service.keyring)
    ours = asyncio.create_task(follow(service, job.id))
    async with service.client_with(key) as other, stream(other, job.id) as theirs:
        async with service.database.write() as session:
            digest = service.keyring.digest_of(key)
            await session.execute(update(ApiKey).where(ApiKey.digest == digest).values(revoked_at=clock.now()))
        assert await asyncio.wait_for(ids_of(theirs), 30) == [1]
    assert not ours.done()
    await end(service, await claim(service))
    assert await asyncio.wait_for(ours, 30) == [1, 2, 3]


async def test_a_database_that_is_away_costs_a_stream_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    await make_job(service.database, service.tenant)
    job = await claim(service)
    following = asyncio.create_task(follow(service, job.id))
    await asyncio.sleep(0.4)
    looks = 0

    async def away(*_: Any) -> Any:
        nonlocal looks
        looks += 1
        raise OSError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(repository, "event_heads", away)
        await end(service, job)
        await asyncio.sleep(0.6)
    assert looks
    assert await asyncio.wait_for(following, 30) == [1, 2, 3]


@pytest.mark.parametrize("limits", [{"max_streams": 3}, {"max_streams_per_tenant": 3}])
async def test_streams_are_limited_and_one_that_leaves_makes_room(
    settings: Settings, database: Database, limits: dict[str, int]
) -> None:
    async with serving(settings, database, HttpSettings(**limits)) as service:
        job = await make_job(service.database, service.tenant)
        async with AsyncExitStack() as stack:
            for _ in range(3):
                assert (await stack.enter_async_context(stream(service.client, job.id))).status_code == 200
            async with stream(service.client, job.id) as fourth:
                assert (fourth.status_code, fourth.headers["retry-after"]) == (429, "5")
                assert json.loads(await fourth.aread())["code"] == "too_many_streams"
        await eventually_open(service, job.id)


async def test_a_client_that_reads_nothing_is_dropped_and_misses_nothing(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.3)
    async with serving(settings, database, HttpSettings(max_streams=1)) as service:
        await make_job(service.database, service.tenant)
        job = await claim(service)
        reader, writer = await open_lazily(service, job.id)
        for _ in range(30):
            await log(service, job, ["x" * 4_000] * 100)
        await end(service, job)
        await eventually_open(service, job.id)
        heard = [int(line[4:]) for line in (await reader.read()).split(b"\n") if line.startswith(b"id: ")]
        writer.close()
        assert heard == list(range(1, len(heard) + 1))
        assert len(heard) < 3_003
        assert await follow(service, job.id, **{"Last-Event-ID": str(heard[-1])}) == list(range(heard[-1] + 1, 3_004))


async def test_streams_hold_no_session(settings: Settings, database: Database) -> None:
    one_connection = settings.model_copy(update={"database": settings.database.model_copy(update={"pool_size": 1})})
    async with serving(one_connection, database, HttpSettings()) as service, AsyncExitStack() as stack:
        job = await make_job(service.database, service.tenant)
        for _ in range(40):
            await stack.enter_async_context(stream(service.client, job.id))
        assert (await service.client.get(f"/v1/jobs/{job.id}")).status_code == 200


async def test_open_streams_do_not_keep_a_service_from_stopping(tmp_path: Path, sqlite_url: str, broker_url: str) -> None:
    write_model(tmp_path / "models" / "tiny")
    async with run_api(tmp_path, sqlite_url, broker_url) as (client, process):
        job = (await client.post("/v1/jobs", json=body())).json()
        async with stream(client, job["id"]) as response:
            reading = asyncio.create_task(ids_of(response))
            await asyncio.sleep(0.5)
            process.terminate()
            assert await asyncio.wait_for(reading, 30) == [1]
        process.communicate(timeout=30)


# The client


async def test_the_client_goes_on_where_a_bad_line_broke_off(service: Service) -> None:
    await make_job(service.database, service.tenant)
    job = await claim(service)
    key = str(service.client.headers["authorization"]).removeprefix("Bearer ")
    async with cutting_proxy(str(service.client.base_url)) as line, AsyncClient(line.url, key) as client:
        line.cuts, line.after = 3, 1_500

        async def work() -> None:
            for number in range(20):
                await asyncio.sleep(0.1)
                await log(service, job, [f"line {number}"])
            await end(service, job)

        async def heard() -> list[int]:
            return [event.seq async for event in client.jobs.stream_events(job.id)]

        seen, _ = await asyncio.wait_for(asyncio.gather(heard(), work()), 30)
        assert seen == list(range(1, 24))
        assert line.connections >= 4


async def test_the_blocking_client_streams_and_tells_of_a_job_that_is_not_there(service: Service) -> None:
    await make_job(service.database, service.tenant)
    job = await claim(service)
    key = str(service.client.headers["authorization"]).removeprefix("Bearer ")

    def talk() -> list[int]:
        with Client(str(service.client.base_url), key) as client:
            seen = [event.seq for event in client.jobs.stream_events(job.id, after=1)]
            assert list(client.jobs.stream_events(job.id, after=seen[-1])) == []
            with pytest.raises(NotFoundError):
                next(iter(client.jobs.stream_events("job_nothing")))
            return seen

    talking = asyncio.create_task(asyncio.to_thread(talk))
    await asyncio.sleep(0.5)
    await end(service, job)
    assert await asyncio.wait_for(talking, 30) == [2, 3]


@asynccontextmanager
async def serving(settings: Settings, database: Database, limits: HttpSettings) -> AsyncIterator[Service]:
    """A service with other limits."""
    async with serve_with_tenant(settings.model_copy(update={"http": limits}), database) as service:
        yield service


async def eventually_open(service: Service, job_id: str) -> None:
    """Open a stream, as soon as there is room for it."""
    async with asyncio.timeout(5):
        while True:
            async with stream(service.client, job_id) as response:
                if response.status_code == 200:
                    return
            await asyncio.sleep(0.05)


async def open_lazily(service: Service, job_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream whose client has asked for it and reads nothing yet, into small buffers."""
    url = service.client.base_url
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    line.connect((url.host, url.port))
    reader, writer = await asyncio.open_connection(sock=line, limit=1_024)
    key = service.client.headers["authorization"]
    writer.write(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAccept: {sse.MEDIA_TYPE}\r\n".encode())
    writer.write(f"Authorization: {key}\r\n\r\n".encode())
    await writer.drain()
    await reader.readuntil(b"retry")
    return reader, writer
