"""`Idempotency-Key`: a request that is sent twice is done once, whatever happens at the same time."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.idempotency import Answer, intent_of, once, reserved
from app.jobs.models import Event, IdempotencyRecord, Job, OutboxMessage
from app.jobs.reaper import reap
from app.jobs.service import create
from app.kit import clock
from secateur.problems import ProblemError
from secateur.recipes import PruneRecipe
from tests.api.conftest import Service
from tests.api.jobs import body, make_job, make_key, make_tenant

KEY = {"Idempotency-Key": "order-66"}


async def count(service: Service, table: type[Job | Event | OutboxMessage | IdempotencyRecord] = Job) -> int:
    async with service.database.read() as session:
        return len((await session.scalars(select(table))).all())


async def test_the_same_request_is_answered_the_same_and_done_once(service: Service) -> None:
    first = await service.client.post("/v1/jobs", json=body(), headers=KEY)
    await service.client.post(f"/v1/jobs/{first.json()['id']}/cancel")
    again = await service.client.post("/v1/jobs", json=body(), headers=KEY)
    assert (again.status_code, again.json(), again.headers["location"]) == (202, first.json(), first.headers["location"])
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert await count(service) == 1


async def test_another_request_with_the_same_key_is_refused(service: Service) -> None:
    await service.client.post("/v1/jobs", json=body(), headers=KEY)
    response = await service.client.post("/v1/jobs", json=body(method={"name": "magnitude"}), headers=KEY)
    assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
    assert await count(service) == 1


async def test_parallel_duplicates_make_one_job(service: Service) -> None:
    responses = await asyncio.gather(*(service.client.post("/v1/jobs", json=body(), headers=KEY) for _ in range(8)))
    accepted = [response for response in responses if response.status_code == 202]
    assert len({response.json()["id"] for response in accepted}) == 1
    assert sum("idempotent-replayed" not in response.headers for response in accepted) == 1
    refused = [response for response in responses if response.status_code != 202]
    assert {response.json()["code"] for response in refused} <= {"idempotency_key_in_flight"}
    assert all(int(response.headers["retry-after"]) > 0 for response in refused)
    assert (await count(service), await count(service, Event), await count(service, OutboxMessage)) == (1, 1, 1)


async def test_a_request_is_refused_while_the_same_is_being_done(service: Service) -> None:
    intent = intent_of(service.tenant.id, "order-66", "create_job", "")

    async def work(*, within: bool) -> None:
        async with reserved(service.database, intent, at=clock.now()):
            if within:
                response = await service.client.post("/v1/jobs", json=body(), headers=KEY)
                assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
                await work(within=False)

    with pytest.raises(ProblemError, match="is being done") as problem:
        await work(within=True)
    assert (problem.value.kind.status, problem.value.kind.retryable) == (409, True)
    # It has failed, so its key is free.
    assert (await service.client.post("/v1/jobs", json=body(), headers=KEY)).status_code == 202


async def test_who_was_overtaken_while_it_worked_has_done_nothing(service: Service) -> None:
    """As after a process that was killed, or an admission that took very long."""
    slow, fast = (intent_of(service.tenant.id, "order-66", "the same") for _ in range(2))

    async def work(session: AsyncSession) -> Answer:
        job, _ = await create(session, service.tenant, PruneRecipe.model_validate(body()), queue="cpu", at=clock.now())
        return Answer(202, {}, {"id": job.id})

    async def be_overtaken() -> None:
        async with reserved(service.database, slow, at=clock.now() - timedelta(seconds=11)):
            async with reserved(service.database, fast, at=clock.now()) as earlier:
                assert earlier is None
                await once(service.database, fast, work, at=clock.now())
            await once(service.database, slow, work, at=clock.now())

    with pytest.raises(ProblemError, match="is being done"):
        await be_overtaken()
    assert await count(service) == 1
    async with reserved(service.database, slow, at=clock.now()) as earlier:
        assert earlier is not None


async def test_requests_without_a_key_are_all_done(service: Service) -> None:
    for _ in range(2):
        await service.client.post("/v1/jobs", json=body())
    assert await count(service) == 2


async def test_a_refused_request_may_be_sent_again_with_the_same_key(service: Service) -> None:
    wrong = body(model={"source": "local", "id": "nowhere"})
    assert (await service.client.post("/v1/jobs", json=wrong, headers=KEY)).status_code == 404
    assert await count(service, IdempotencyRecord) == 0
    assert (await service.client.post("/v1/jobs", json=body(), headers=KEY)).status_code == 202


async def test_tenants_do_not_share_keys(service: Service) -> None:
    stranger = await make_tenant(service.database, "stranger")
    await service.client.post("/v1/jobs", json=body(), headers=KEY)
    async with service.client_with(await make_key(service.database, stranger, service.keyring)) as client:
        response = await client.post("/v1/jobs", json=body(method={"name": "magnitude"}), headers=KEY)
    assert response.status_code == 202
    assert await count(service) == 2


async def test_a_retry_is_done_once_too(service: Service) -> None:
    job = await make_job(service.database, service.tenant, status="failed")
    other = await make_job(service.database, service.tenant, status="failed")
    first, again = [await service.client.post(f"/v1/jobs/{job.id}/retry", headers=KEY) for _ in range(2)]
    assert first.json() == again.json()
    assert await count(service) == 3
    assert (await service.client.post(f"/v1/jobs/{other.id}/retry", headers=KEY)).json()["code"] == "idempotency_key_reused"


async def test_a_key_is_free_again_after_a_day_and_forgotten_by_the_reaper(service: Service) -> None:
    await service.client.post("/v1/jobs", json=body(), headers=KEY)

    async def age() -> None:
        async with service.database.write() as session:
            for record in await session.scalars(select(IdempotencyRecord)):
                record.expires_at = clock.now() - timedelta(seconds=1)

    await age()
    response = await service.client.post("/v1/jobs", json=body(method={"name": "magnitude"}), headers=KEY)
    assert (response.status_code, await count(service)) == (202, 2)
    await age()
    async with service.database.write() as session:
        await reap(session, at=clock.now(), max_barren_attempts=3)
    assert await count(service, IdempotencyRecord) == 0


@pytest.mark.parametrize("key", ["", "a b", "a" * 256])
async def test_a_key_that_is_none_is_refused(service: Service, key: str) -> None:
    response = await service.client.post("/v1/jobs", json=body(), headers={"Idempotency-Key": key})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/header/Idempotency-Key")
