"""What nobody needs any more goes, and nothing else: collection, deletion, expiry, and a disk that is almost full."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.artifacts import gc
from app.artifacts.gc import Collected, collect
from app.artifacts.local import LocalStore
from app.artifacts.models import Artifact, Upload
from app.integrations.models import JobIntegration
from app.jobs import claims, retention
from app.jobs.claims import NewArtifact
from app.jobs.models import Job
from app.kit import clock
from app.kit.db import Database
from app.settings import DiskSettings, Settings
from secateur.problems import ProblemError
from tests.api.conftest import Service, serve
from tests.api.jobs import body, make_job, make_key, make_tenant
from tests.api.work import LEASE, claim, succeed
from workers.supervisor import work_once

NOTHING = timedelta(0)


@pytest.fixture
async def store(service: Service) -> AsyncIterator[LocalStore]:
    """The service's own store."""
    async with LocalStore(Path(service.settings.state_folder, "artifacts")) as store:
        yield store


async def put(store: LocalStore, tenant_id: str, content: bytes, folder: Path) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    (folder / sha256).write_bytes(content)
    await store.put_file(tenant_id, sha256, folder / sha256)
    return sha256


async def collected(service: Service, store: LocalStore, grace: timedelta = NOTHING) -> Collected:
    return await collect(service.database, store, at=clock.now() + timedelta(seconds=1), grace=grace)


async def begin_upload(database: Database, job: Job, sha256: str) -> object:
    async with database.write() as session:
        return await claims.begin_upload(session, job.id, job.attempt, digests=[sha256], at=clock.now())


async def test_what_no_file_names_is_collected_and_the_rest_stays(
    service: Service, store: LocalStore, tmp_path: Path
) -> None:
    job_id = await succeed(service, tmp_path, {"model.safetensors": b"needed"})
    kept = hashlib.sha256(b"needed").hexdigest()
    orphan = await put(store, service.tenant.id, b"orphan", tmp_path)
    strange = await put(store, "tnt_other", b"needed", tmp_path)  # the same bytes, of a tenant that does not need them
    assert await collected(service, store, timedelta(hours=1)) == Collected()
    assert await collected(service, store) == Collected(blobs=2, bytes=12)
    assert await store.exists(service.tenant.id, kept)
    assert not await store.exists(service.tenant.id, orphan)
    assert not await store.exists("tnt_other", strange)
    assert await collected(service, store) == Collected()
    (artifact,) = (await service.client.get(f"/v1/jobs/{job_id}/artifacts")).json()["data"]
    assert (await service.client.get(f"/v1/artifacts/{artifact['id']}/content")).content == b"needed"


async def test_an_upload_is_left_in_peace_until_its_job_ends(service: Service, store: LocalStore, tmp_path: Path) -> None:
    await make_job(service.database, service.tenant)
    job = await claim(service)
    sha256 = hashlib.sha256(b"coming").hexdigest()
    assert await begin_upload(service.database, job, sha256) == "running"
    await put(store, service.tenant.id, b"coming", tmp_path)
    assert await collected(service, store) == Collected()
    async with service.database.write() as session:
        await claims.fail(
            session, job.id, 1, error={"code": "internal_error", "detail": "x"}, max_barren_attempts=3, at=clock.now()
        )
    assert await begin_upload(service.database, job, sha256) is None
    assert await collected(service, store) == Collected(blobs=1, bytes=6)
    async with service.database.read() as session:
        assert (await session.scalars(select(Upload))).all() == []


async def test_an_upload_that_begins_during_the_removal_waits_for_it(
    service: Service, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else it would find the blob there, leave it at that, and the job would succeed without its bytes."""
    await make_job(service.database, service.tenant)
    job = await claim(service)
    sha256 = await put(store, service.tenant.id, b"shared", tmp_path)
    deleting, go_on = asyncio.Event(), asyncio.Event()
    delete = store.delete

    async def slowly(tenant_id: str, sha256: str) -> None:
        deleting.set()
        await go_on.wait()
        await delete(tenant_id, sha256)

    monkeypatch.setattr(store, "delete", slowly)
    collecting = asyncio.create_task(collected(service, store))
    await deleting.wait()
    beginning = asyncio.create_task(begin_upload(service.database, job, sha256))
    await asyncio.wait({beginning}, timeout=0.2)
    assert not beginning.done()
    go_on.set()
    await beginning
    await put(store, service.tenant.id, b"shared", tmp_path)
    assert (await collecting).blobs == 1
    results: dict[str, Any] = {"metrics": {}, "report": {}, "artifacts": [NewArtifact("m", 6, sha256)]}
    async with service.database.write() as session:
        assert await claims.succeed(session, job.id, 1, **results, at=clock.now())
    assert await collected(service, store) == Collected()
    assert await store.exists(service.tenant.id, sha256)


async def test_a_file_whose_bytes_are_lost_is_told_once_and_found_again(
    service: Service, store: LocalStore, tmp_path: Path
) -> None:
    job_id = await succeed(service, tmp_path, {"model.safetensors": b"needed"})
    sha256 = hashlib.sha256(b"needed").hexdigest()
    await store.delete(service.tenant.id, sha256)
    assert await collected(service, store) == Collected(lost=1)
    assert await collected(service, store) == Collected()
    (artifact,) = (await service.client.get(f"/v1/jobs/{job_id}")).json()["artifacts"]
    assert artifact["lost_at"] is not None
    lost = await service.client.get(f"/v1/artifacts/{artifact['id']}/content")
    assert (lost.status_code, lost.json()["code"]) == (410, "artifact_lost")
    await put(store, service.tenant.id, b"needed", tmp_path)
    await collected(service, store)
    assert (await service.client.get(f"/v1/artifacts/{artifact['id']}/content")).content == b"needed"
    events = (await service.client.get(f"/v1/jobs/{job_id}/events")).json()["data"]
    assert [event["message"] for event in events if event["type"] == "log"] == [
        "the bytes of model.safetensors are not in the store", "the bytes of model.safetensors are in the store again",
    ]  # fmt: skip


async def test_a_deleted_job_leaves_a_tombstone_and_no_bytes_that_are_only_its(
    service: Service, store: LocalStore, tmp_path: Path
) -> None:
    other = await succeed(service, tmp_path, {"tokenizer.json": b"shared"})
    job_id = await succeed(service, tmp_path, {"model.safetensors": b"mine", "tokenizer.json": b"shared"})
    for _ in range(2):
        assert (await service.client.delete(f"/v1/jobs/{job_id}")).status_code == 204
    mine, shared = (hashlib.sha256(content).hexdigest() for content in (b"mine", b"shared"))
    for _ in range(100):  # after the answer
        if not await store.exists(service.tenant.id, mine):
            break
        await asyncio.sleep(0.02)
    assert not await store.exists(service.tenant.id, mine)
    assert await store.exists(service.tenant.id, shared)
    tombstone = (await service.client.get(f"/v1/jobs/{job_id}")).json()
    assert (tombstone["status"], tombstone["artifacts"]) == ("succeeded", [])
    assert tombstone["deleted_at"] is not None
    assert [job["id"] for job in (await service.client.get("/v1/jobs")).json()["data"]] == [other]
    assert (await service.client.get(f"/v1/jobs/{job_id}/report")).status_code == 404
    assert (await service.client.get(f"/v1/jobs/{job_id}/events")).json()["data"][-1]["message"] == "the job was deleted"


async def test_only_a_job_of_ones_own_that_has_ended_can_be_deleted(service: Service) -> None:
    queued = await make_job(service.database, service.tenant)
    refused = await service.client.delete(f"/v1/jobs/{queued.id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "job_not_finished")
    failed = await make_job(service.database, service.tenant, status="failed")
    stranger = await make_tenant(service.database, "stranger")
    async with service.client_with(await make_key(service.database, stranger, service.keyring)) as client:
        assert (await client.delete(f"/v1/jobs/{failed.id}")).status_code == 404
    await service.client.delete(f"/v1/jobs/{failed.id}")
    again = await service.client.post(f"/v1/jobs/{failed.id}/retry")
    assert (again.status_code, again.json()["code"]) == (409, "job_not_retryable")


async def test_files_expire_and_nobody_takes_an_empty_model_anywhere(service: Service, store: LocalStore) -> None:
    job = await make_job(service.database, service.tenant)
    job, now = await claim(service), clock.now()
    async with service.database.write() as session:
        results: dict[str, Any] = {"metrics": {}, "report": {}, "artifacts": [NewArtifact("m", 1, "a" * 64)]}
        session.add(JobIntegration(job_id=job.id, position=0, name="hub_push", options={}, status="waiting"))
        await claims.succeed(session, job.id, 1, **results, keep_for=timedelta(days=3), at=now)
    shown = (await service.client.get(f"/v1/jobs/{job.id}")).json()
    assert shown["artifacts_expire_at"] == (now + timedelta(days=3)).isoformat().replace("+00:00", "Z")
    for days, expired in ((2, 0), (4, 1), (4, 0)):
        async with service.database.write() as session:
            assert await retention.expire_files(session, at=now + timedelta(days=days)) == expired
    shown = (await service.client.get(f"/v1/jobs/{job.id}")).json()
    assert (shown["status"], shown["artifacts"], shown["metrics"]) == ("succeeded", [], shown["metrics"])
    assert [(one["status"], one["error"]["code"]) for one in shown["integrations"]] == [("failed", "integration_failed")]
    async with service.database.read() as session:
        assert (await session.scalars(select(Artifact))).all() == []


async def test_a_store_that_is_away_leaves_the_bytes_to_the_next_round(
    service: Service, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = await put(store, service.tenant.id, b"orphan", tmp_path)

    async def away(*_: object) -> None:
        raise ProblemError("service_unavailable", "the artifact store does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(store, "delete", away)
        await gc.remove(service.database, store, service.tenant.id, [sha256])
    assert await collected(service, store) == Collected(blobs=1, bytes=6)


async def test_a_disk_that_is_almost_full_takes_no_new_job_and_begins_none(service: Service, settings: Settings) -> None:
    full = settings.model_copy(update={"disk": DiskSettings(reserve_gb=1e9)})
    async with serve(full) as url:
        refused = await service.client.post(f"{url}/v1/jobs", json=body())
    assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (507, "disk_almost_full", True)
    job = await make_job(service.database, service.tenant)
    for _ in range(2):
        assert not await work_once(full)
    shown = (await service.client.get(f"/v1/jobs/{job.id}")).json()
    assert (shown["status"], shown["attempt"]) == ("queued", 0)
    events = (await service.client.get(f"/v1/jobs/{job.id}/events")).json()["data"]
    (told,) = events[1:]  # once
    assert told["message"].endswith("begins no job: its disk is almost full")
    async with service.database.write() as session:  # a worker with room takes it
        assert await claims.claim(session, queues=["cpu"], worker="w", lease=LEASE, at=clock.now())
