"""Jobs over HTTP: submit, look, wait, list, cancel, retry, and what is nobody else's business."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import select, update

from app.accounts.keys import Scope
from app.accounts.models import Tenant
from app.jobs import claims, repository
from app.jobs import service as jobs
from app.jobs.events import LogLine
from app.jobs.models import Event, Job, OutboxMessage
from app.kit import clock
from secateur.recipes import PruneRecipe
from tests.api.conftest import Service
from tests.api.jobs import body, make_job, make_key, make_tenant

LEASE = timedelta(seconds=30)


async def submit(service: Service, **changes: Any) -> dict[str, Any]:
    response = await service.client.post("/v1/jobs", json=body(**changes))
    assert response.status_code == 202, response.text
    document: dict[str, Any] = response.json()
    return document


async def claim(service: Service) -> Job:
    async with service.database.write() as session:
        job = await claims.claim(session, queues=["cpu"], worker="w", lease=LEASE, at=clock.now())
    assert job is not None
    return job


async def test_a_job_is_committed_with_event_and_doorbell_before_the_answer(service: Service) -> None:
    response = await service.client.post("/v1/jobs", json=body())
    job_id = response.json()["id"]
    async with service.database.read() as session:
        assert (await session.scalars(select(Job.status).where(Job.id == job_id))).all() == ["queued"]
        assert (await session.scalars(select(Event.seq).where(Event.job_id == job_id))).all() == [1]
        assert len((await session.scalars(select(OutboxMessage))).all()) == 1
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{job_id}"
    found = (await service.client.get(response.headers["location"])).json()
    assert {**found, "waiting": None} == response.json()


async def test_the_job_is_what_the_contract_says(service: Service) -> None:
    job = await submit(service, metadata={"team": "search"}, output={"name": "mine"})
    wanda = {"name": "wanda", "comparison": "row", "compensation": {"name": "none"}, "induction": None}
    assert job["recipe"]["method"] == wanda
    assert job["recipe"]["calibration"] == {
        "dataset": "wikitext2-sample", "samples": 2, "sequence_length": 16, "seed": 0,
    }  # fmt: skip
    assert job["recipe"]["metadata"] == {"team": "search"}
    assert job["created_at"] == job["queued_at"]
    assert job["created_at"].endswith("Z")
    assert {name: value for name, value in job.items() if name not in {"id", "recipe", "created_at", "queued_at"}} == {
        "object": "job", "kind": "prune", "status": "queued", "stage": None, "progress": None, "attempt": 0, "metrics": None,
        "artifacts": [], "integrations": [],
        "queue": "cpu", "waiting": None,
        "repository": "default/mine", "retry_of": None, "error": None, "started_at": None,
        "cancelling_at": None, "finished_at": None, "artifacts_expire_at": None, "deleted_at": None,
    }  # fmt: skip


async def test_the_doorbell_rings_after_the_commit(service: Service, broker_url: str) -> None:
    broker = Redis.from_url(broker_url)
    broker.flushall()
    await submit(service)
    # The mark is committed first: who claims a message rings it.
    for _ in range(500):
        if broker.llen("cpu"):
            break
        await asyncio.sleep(0.02)
    assert broker.llen("cpu") == 1
    async with service.database.read() as session:
        assert (await session.scalars(select(OutboxMessage.sent_at))).one() is not None


async def test_a_finished_job_shows_metrics_files_and_report(service: Service) -> None:
    submitted = await submit(service)
    assert (await service.client.get(f"/v1/jobs/{submitted['id']}/report")).json()["code"] == "job_not_finished"
    job = await claim(service)
    files = [claims.NewArtifact("model.safetensors", 3, "a" * 64), claims.NewArtifact("config.json", 2, "b" * 64)]
    perplexity = {"dense": 20.5, "pruned": 30.5, "protocol": {"windows": 3}}
    metrics = {"sparsity": 0.5, "perplexity": perplexity, "novel": 1}
    report: dict[str, Any] = {"blocks": [{"linears": {}}]}
    async with service.database.write() as session:
        await claims.succeed(session, job.id, 1, metrics=metrics, report=report, artifacts=files, at=clock.now())
    shown = (await service.client.get(f"/v1/jobs/{job.id}")).json()
    assert shown["status"] == "succeeded"
    assert shown["metrics"]["perplexity"] == {**perplexity, "value": None}
    assert shown["metrics"]["novel"] == 1
    assert [file["name"] for file in shown["artifacts"]] == ["config.json", "model.safetensors"]
    assert (await service.client.get(f"/v1/jobs/{job.id}/artifacts")).json()["data"] == shown["artifacts"]
    assert (await service.client.get(f"/v1/jobs/{job.id}/report")).json() == report


async def test_a_job_that_makes_no_model_has_neither_method_nor_repository(service: Service) -> None:
    asked = {
        "kind": "evaluate",
        "model": {"source": "local", "id": "tiny"},
        "evaluation": {"perplexity": {"sequence_length": 64}},
    }
    submitted = (await service.client.post("/v1/jobs", json=asked)).json()
    assert (submitted["kind"], submitted["repository"], submitted["integrations"]) == ("evaluate", None, [])
    assert submitted["recipe"]["evaluation"]["perplexity"]["dataset"] == "wikitext2-sample"
    job = await claim(service)
    metrics = {"perplexity": {"value": 20.5, "protocol": {"windows": 3}}, "seconds": {"total": 1.0}}
    async with service.database.write() as session:
        await claims.succeed(session, job.id, 1, metrics=metrics, report={"perplexity": {}}, artifacts=[], at=clock.now())
    assert (await service.client.get(f"/v1/jobs/{job.id}")).json()["metrics"]["perplexity"]["value"] == 20.5
    assert [one["source"] for one in (await service.client.get("/v1/models")).json()["data"]] == ["local"]
    assert (await service.client.get("/v1/jobs?method=wanda")).json()["data"] == []


async def test_a_failed_job_shows_its_problem(service: Service) -> None:
    await submit(service)
    job = await claim(service)
    error = {
        "type": "https://secateur.dev/errors/disk-full", "title": "The disk is full", "status": 507, "detail": "no room",
        "code": "disk_full", "retryable": True, "hint": "Make room.",
    }  # fmt: skip
    async with service.database.write() as session:
        await claims.fail(session, job.id, 1, error=error, max_barren_attempts=1, at=clock.now())
    shown = (await service.client.get(f"/v1/jobs/{job.id}")).json()
    assert {name: shown["error"][name] for name in error} == error
    assert (await service.client.get(f"/v1/jobs/{job.id}/report")).status_code == 404


async def test_attempts_tell_who_had_the_job_and_how_that_ended(service: Service) -> None:
    await submit(service)
    first = await claim(service)
    async with service.database.write() as session:
        await claims.release(session, first.id, 1, at=clock.now())
    await claim(service)
    tries = (await service.client.get(f"/v1/jobs/{first.id}/attempts")).json()["data"]
    assert [(one["number"], one["outcome"], one["ended_at"] is None) for one in tries] == [
        (1, "drained", False), (2, None, True),
    ]  # fmt: skip
    assert {(one["worker"], one["queue"], one["blocks_done"]) for one in tries} == {("w", "cpu", 0)}
    stranger = await make_tenant(service.database, "stranger")
    async with service.client_with(await make_key(service.database, stranger, service.keyring)) as client:
        assert (await client.get(f"/v1/jobs/{first.id}/attempts")).status_code == 404


async def test_cancelling_a_queued_job_ends_it_at_once_and_again_is_no_error(service: Service) -> None:
    job = await submit(service)
    for _ in range(2):
        response = await service.client.post(f"/v1/jobs/{job['id']}/cancel")
        assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    events = (await service.client.get(f"/v1/jobs/{job['id']}/events")).json()["data"]
    assert [event["data"]["status"] for event in events] == ["queued", "cancelled"]
    async with service.database.write() as session:
        assert await claims.claim(session, queues=["cpu"], worker="w", lease=LEASE, at=clock.now()) is None


async def test_cancelling_a_running_job_tells_its_worker(service: Service) -> None:
    await submit(service)
    job = await claim(service)
    for _ in range(2):
        assert (await service.client.post(f"/v1/jobs/{job.id}/cancel")).json()["status"] == "cancelling"
    async with service.database.write() as session:
        assert await claims.confirm_cancelled(session, job.id, 1, at=clock.now())
    assert (await service.client.post(f"/v1/jobs/{job.id}/cancel")).json()["status"] == "cancelled"


@pytest.mark.parametrize("status", ["succeeded", "failed", "expired"])
async def test_a_job_that_ended_otherwise_cannot_be_cancelled(service: Service, status: str) -> None:
    job = await make_job(service.database, service.tenant, status=status)
    response = await service.client.post(f"/v1/jobs/{job.id}/cancel")
    assert (response.status_code, response.json()["code"]) == (409, "job_not_cancellable")


async def test_cancel_and_claim_at_the_same_time_agree(service: Service) -> None:
    for _ in range(5):
        job = await submit(service)

        async def take() -> Job | None:
            async with service.database.write() as session:
                return await claims.claim(session, queues=["cpu"], worker="w", lease=LEASE, at=clock.now())

        taken, response = await asyncio.gather(take(), service.client.post(f"/v1/jobs/{job['id']}/cancel"))
        assert response.json()["status"] == ("cancelling" if taken else "cancelled")


@pytest.mark.parametrize("status", ["failed", "cancelled", "expired"])
async def test_a_retry_is_a_new_job_with_the_same_recipe(service: Service, status: str) -> None:
    old = await make_job(service.database, service.tenant, status=status, labels={"team": "search"})
    response = await service.client.post(f"/v1/jobs/{old.id}/retry")
    new = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{new['id']}"
    assert (new["id"] != old.id, new["retry_of"], new["status"], new["recipe"]) == (True, old.id, "queued", old.recipe)


@pytest.mark.parametrize("status", ["queued", "running", "cancelling", "succeeded"])
async def test_other_jobs_are_not_retried(service: Service, status: str) -> None:
    job = await make_job(service.database, service.tenant, status=status)
    response = await service.client.post(f"/v1/jobs/{job.id}/retry")
    assert (response.status_code, response.json()["code"]) == (409, "job_not_retryable")


async def test_waiting_ends_when_the_job_changes(service: Service) -> None:
    job = await submit(service)
    waiting = asyncio.create_task(service.client.get(f"/v1/jobs/{job['id']}", params={"wait": 20}))
    await asyncio.sleep(0.6)
    assert not waiting.done()
    await claim(service)
    started = time.monotonic()
    assert (await waiting).json()["status"] == "running"
    assert time.monotonic() - started < 10
    waiting = asyncio.create_task(service.client.get(f"/v1/jobs/{job['id']}", params={"wait": 20}))
    await asyncio.sleep(0.3)
    progress = {"done": 1, "total": 2, "unit": "blocks", "eta_seconds": 1.0}
    async with service.database.write() as session:
        logs = [LogLine("info", "x")]
        await claims.record(session, job["id"], 1, stage="pruning", progress=progress, logs=logs, at=clock.now())
    assert (await waiting).json()["progress"] == progress


async def test_waiting_is_over_in_time_and_for_an_ended_job_at_once(service: Service) -> None:
    job = await submit(service)
    started = time.monotonic()
    assert (await service.client.get(f"/v1/jobs/{job['id']}", params={"wait": 0.5})).json()["status"] == "queued"
    assert 0.4 < time.monotonic() - started < 10
    await service.client.post(f"/v1/jobs/{job['id']}/cancel")
    started = time.monotonic()
    await service.client.get(f"/v1/jobs/{job['id']}", params={"wait": 20})
    assert time.monotonic() - started < 10


async def test_those_who_wait_hold_no_connection(service: Service) -> None:
    """The pool has ten; thirty wait, and the service still answers at once."""
    job = await submit(service)
    waiting = [
        asyncio.create_task(service.client.get(f"/v1/jobs/{job['id']}", params={"wait": 20}, timeout=30)) for _ in range(30)
    ]
    await asyncio.sleep(0.5)
    await service.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert {(await response).json()["status"] for response in waiting} == {"cancelled"}


async def test_events_are_listed_in_order_after_a_number(service: Service) -> None:
    await submit(service)
    job = await claim(service)
    async with service.database.write() as session:
        logs = [LogLine("warning", f"line {n}") for n in range(5)]
        await claims.record(session, job.id, 1, stage="calibrating", progress=None, logs=logs, at=clock.now())
    first = (await service.client.get(f"/v1/jobs/{job.id}/events", params={"limit": 5})).json()
    rest = (await service.client.get(f"/v1/jobs/{job.id}/events", params={"after": 5})).json()
    assert ([event["seq"] for event in first["data"]], first["has_more"]) == ([1, 2, 3, 4, 5], True)
    assert ([event["seq"] for event in rest["data"]], rest["has_more"]) == ([6, 7, 8], False)
    assert (rest["data"][-1]["level"], rest["data"][-1]["message"]) == ("warning", "line 4")


async def test_pages_are_complete_and_without_doubles_while_jobs_arrive(service: Service) -> None:
    at = clock.now() - timedelta(minutes=1)
    # Three of the same moment each, so that only the id tells them apart.
    made = [await make_job(service.database, service.tenant, at=at + timedelta(seconds=n // 3)) for n in range(15)]
    seen: list[str] = []
    cursor = None
    while True:
        page = (await service.client.get("/v1/jobs", params={"limit": 4} | ({"cursor": cursor} if cursor else {}))).json()
        seen += [job["id"] for job in page["data"]]
        await submit(service)
        cursor = page["next_cursor"]
        assert page["has_more"] is (cursor is not None)
        if cursor is None:
            break
    assert seen == [job.id for job in sorted(made, key=lambda job: (job.created_at, job.id), reverse=True)]


async def test_lists_are_filtered(service: Service) -> None:
    at = clock.now()
    old = await make_job(service.database, service.tenant, at=at - timedelta(days=1), labels={"team": "search", "a b": "1"})
    new = await make_job(
        service.database, service.tenant, at=at, status="failed", labels={"team": "ads"}, method="sparsegpt"
    )
    other = await make_job(service.database, service.tenant, at=at, status="running", model="big")
    odd = await make_job(service.database, service.tenant, at=at, labels={"q\"$.[0]\\%'": "é%_"})

    async def ids(**params: Any) -> set[str]:
        response = await service.client.get("/v1/jobs", params=params)
        assert response.status_code == 200, response.text
        return {job["id"] for job in response.json()["data"]}

    assert await ids(status=["failed", "running"]) == {new.id, other.id}
    assert await ids(method="sparsegpt") == {new.id}
    assert await ids(model="big") == {other.id}
    assert await ids(created_after=(at - timedelta(hours=1)).isoformat()) == {new.id, other.id, odd.id}
    assert await ids(created_after="0001-01-01T00:00:00Z") == {old.id, new.id, other.id, odd.id}
    assert await ids(**{"metadata[team]": "search"}) == {old.id}
    assert await ids(**{"metadata[team]": "search", "metadata[a b]": "1"}) == {old.id}
    assert await ids(**{"metadata[team]": "search", "metadata[a b]": "2"}) == set()
    assert await ids(**{"metadata[q\"$.[0]\\%']": "é%_"}) == {odd.id}
    assert await ids(**{"metadata[q\"$.[0]\\%']": "é%"}) == set()


@pytest.mark.parametrize(
    ("params", "pointer"),
    [
        ({"cursor": "nonsense"}, "/query/cursor"),
        ({"cursor": "é"}, "/query/cursor"),
        ({"limit": 101}, "/query/limit"),
        ({"limit": 0}, "/query/limit"),
        ({"status": "sleeping"}, "/query/status/0"),
        ({"created_after": "2026-01-01T00:00:00"}, "/query/created_after"),
        ({"created_after": "0001-01-01T00:00:00+14:00"}, "/query/created_after"),
        ({"created_after": "9999-12-31T23:59:59-14:00"}, "/query/created_after"),
        ({"stauts": "failed"}, "/query/stauts"),
        ({"metadata": "failed"}, "/query/metadata"),
    ],
)
async def test_a_wrong_parameter_is_pointed_at(service: Service, params: dict[str, Any], pointer: str) -> None:
    response = await service.client.get("/v1/jobs", params=params)
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, pointer)


async def test_a_cursor_of_another_installation_is_refused(service: Service) -> None:
    for _ in range(2):
        await submit(service)
    cursor = (await service.client.get("/v1/jobs", params={"limit": 1})).json()["next_cursor"]
    forged = cursor[:-2] + ("A" if cursor[-2] != "A" else "B") + cursor[-1]
    assert (await service.client.get("/v1/jobs", params={"cursor": cursor})).status_code == 200
    assert (await service.client.get("/v1/jobs", params={"cursor": forged})).status_code == 422


async def test_other_tenants_jobs_are_not_there(service: Service) -> None:
    stranger = await make_tenant(service.database, "stranger")
    theirs = await make_job(service.database, stranger, status="failed")
    for path in ("", "/events", "/report", "/artifacts"):
        response = await service.client.get(f"/v1/jobs/{theirs.id}{path}")
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
    for action in ("cancel", "retry"):
        assert (await service.client.post(f"/v1/jobs/{theirs.id}/{action}")).status_code == 404
    assert (await service.client.get("/v1/jobs")).json()["data"] == []
    async with service.database.read() as session:
        assert await repository.find(session, stranger.id, theirs.id) is not None
        assert (await session.scalars(select(Job.status))).all() == ["failed"]


async def test_a_key_that_may_read_may_not_write(service: Service) -> None:
    key = await make_key(service.database, service.tenant, service.keyring, [Scope.JOBS_READ])
    job = await make_job(service.database, service.tenant)
    async with service.client_with(key) as reader:
        assert (await reader.get(f"/v1/jobs/{job.id}")).status_code == 200
        for call in (
            reader.post("/v1/jobs", json=body()),
            reader.post(f"/v1/jobs/{job.id}/cancel"),
            reader.post(f"/v1/jobs/{job.id}/retry"),
            reader.get(f"/v1/jobs/{job.id}/artifacts"),
        ):
            assert (await call).json()["code"] == "forbidden"


async def test_a_tenant_without_local_models_finds_none(service: Service) -> None:
    guest = await make_tenant(service.database, "guest", reads_local_models=False)
    async with service.client_with(await make_key(service.database, guest, service.keyring)) as client:
        response = await client.post("/v1/jobs", json=body())
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


async def test_a_retry_is_admitted_like_a_new_job(service: Service) -> None:
    """A tenant that has lost its right to local models, or whose model has changed, is told so at once."""
    job = await make_job(service.database, service.tenant, status="failed")
    write = service.settings.models_root / "tiny" / "config.json"
    sound = write.read_text()
    write.write_text(sound.replace('"max_position_embeddings": 128', '"max_position_embeddings": 8'))
    response = await service.client.post(f"/v1/jobs/{job.id}/retry")
    assert (response.status_code, response.json()["code"]) == (422, "sequence_too_long")
    write.write_text(sound)
    async with service.database.write() as session:
        await session.execute(update(Tenant).values(reads_local_models=False))
    response = await service.client.post(f"/v1/jobs/{job.id}/retry")
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")
    assert [shown["id"] for shown in (await service.client.get("/v1/jobs")).json()["data"]] == [job.id]


async def test_nothing_is_left_of_a_job_whose_commit_failed(service: Service) -> None:
    async def interrupted() -> None:
        async with service.database.write() as session:
            await jobs.create(session, service.tenant, PruneRecipe.model_validate(body()), queue="cpu", at=clock.now())
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        await interrupted()
    async with service.database.read() as session:
        for table in (Job, Event, OutboxMessage):
            assert (await session.scalars(select(table))).all() == []
