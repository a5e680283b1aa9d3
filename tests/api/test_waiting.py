"""A queued job tells its place in line, who serves its queue, and when it may begin."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from app.accounts.keys import Scope
from app.jobs import presence
from app.jobs.models import Job
from app.kit import clock
from app.settings import JobsSettings, Settings
from tests.api.conftest import Service, serve
from tests.api.jobs import body, make_job, make_key
from tests.api.work import claim


async def look(service: Service, *, ago: float = 0, **answers: list[str]) -> None:
    """What the scheduler does: it writes down who has answered."""
    async with service.database.write() as session:
        await presence.note(session, answers, at=clock.now() - timedelta(seconds=ago))


async def waiting(service: Service, job: Job) -> Mapping[str, Any] | None:
    shown: Mapping[str, Any] | None = (await service.client.get(f"/v1/jobs/{job.id}")).json()["waiting"]
    return shown


async def test_the_place_in_line_is_by_priority_and_then_by_age(service: Service) -> None:
    old, new = [await make_job(service.database, service.tenant) for _ in range(2)]
    urgent = await make_job(service.database, service.tenant, priority=1)
    elsewhere = await make_job(service.database, service.tenant, queue="gpu.24g")
    places = {job["id"]: job["waiting"]["position"] for job in (await service.client.get("/v1/jobs")).json()["data"]}
    assert places == {urgent.id: 1, old.id: 2, new.id: 3, elsewhere.id: 1}
    assert (await claim(service)).id == urgent.id
    assert await waiting(service, urgent) is None
    shown = await waiting(service, new)
    assert shown is not None
    assert shown["position"] == 2


async def test_a_queue_that_nobody_serves_is_told(service: Service) -> None:
    job = await make_job(service.database, service.tenant)

    async def workers() -> Any:
        shown = await waiting(service, job)
        return shown and shown["workers"]

    assert await workers() is None  # nobody has looked
    await look(service, gpu=["gpu.24g"])
    assert await workers() == 0
    await look(service, one=["cpu", "gpu.24g"], two=["cpu"])
    assert await workers() == 2
    await look(service, one=["cpu"])
    assert await workers() == 2  # the other one may be busy
    await look(service, ago=-60, one=["cpu"])
    assert await workers() == 1


async def test_nobody_knows_who_is_there_while_the_broker_is_away(service: Service) -> None:
    job = await make_job(service.database, service.tenant)
    await look(service, ago=60, one=["cpu"])
    shown = await waiting(service, job)
    assert shown == {"position": 1, "workers": None, "eta_seconds": None}


async def test_the_guess_is_from_the_jobs_before(service: Service) -> None:
    now = clock.now()
    took = {"started_at": now - timedelta(seconds=200), "finished_at": now - timedelta(seconds=100)}
    await make_job(service.database, service.tenant, status="succeeded", **took)
    await make_job(service.database, service.tenant, status="running", started_at=now - timedelta(seconds=40))
    first, second = [await make_job(service.database, service.tenant) for _ in range(2)]
    await look(service, one=["cpu"])
    shown = [await waiting(service, job) for job in (first, second)]
    assert [one and one["eta_seconds"] for one in shown] == [pytest.approx(60, abs=5), pytest.approx(160, abs=5)]


async def test_schedule_becomes_the_jobs_priority_and_deadlines(service: Service) -> None:
    schedule = {"priority": 3, "start_deadline": 600, "max_runtime": 7200}
    shown = (await service.client.post("/v1/jobs", json=body(schedule=schedule))).json()
    assert shown["recipe"]["schedule"] == schedule
    job = await claim(service)
    assert (job.priority, job.start_by) == (3, job.created_at + timedelta(seconds=600))
    assert job.started_at is not None
    assert job.stop_by == job.started_at + timedelta(seconds=7200)


async def test_only_an_admin_passes_others_by(service: Service) -> None:
    key = await make_key(service.database, service.tenant, service.keyring, [Scope.JOBS_WRITE])
    async with service.client_with(key) as client:
        refused = await client.post("/v1/jobs", json=body(schedule={"priority": 1}))
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (403, "/schedule/priority")
        assert (await client.post("/v1/jobs", json=body(schedule={"priority": -1}))).status_code == 202


async def test_the_queue_is_that_of_the_smallest_gpu_of_the_installation(service: Service, settings: Settings) -> None:
    assert (await service.client.post("/v1/jobs", json=body())).json()["queue"] == "cpu"
    with_gpus = settings.model_copy(update={"jobs": JobsSettings(queues=("gpu.24g", "gpu.80g"))})
    async with serve(with_gpus) as url:
        response = await service.client.post(f"{url}/v1/jobs", json=body())
    assert (response.status_code, response.json()["queue"]) == (202, "gpu.24g")
