"""A model that one job made is what the next one is about: found, refused, brought from either kind of store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from app.artifacts.models import Artifact
from app.artifacts.store import Store, open_store
from app.jobs.models import Job
from app.kit import clock
from app.models import artifact
from secateur.problems import ProblemError
from secateur.recipes import Model
from tests.api.conftest import Service
from tests.api.jobs import body, make_job, make_key, make_tenant
from tests.api.models import write_model
from tests.api.work import claim, succeed
from tests.s3_server import KEY_ID, SECRET, serve_s3


@pytest.fixture
async def made(service: Service, tmp_path: Path) -> str:
    """The id of a job that made a tiny Llama."""
    folder = write_model(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "blobs").mkdir()
    return await succeed(service, tmp_path / "blobs", files)


def on(model_id: str, **more: Any) -> dict[str, Any]:
    return body(model={"source": "artifact", "id": model_id, **more})


async def refusal(service: Service, asked: dict[str, Any]) -> tuple[int, str, str]:
    problem = (await service.client.post("/v1/jobs", json=asked)).json()
    return problem["status"], problem["code"], problem["errors"][0]["pointer"]


@pytest.mark.parametrize("named", ["job", "repository", "revision"])
async def test_it_is_found_by_job_and_by_repository_and_its_job_is_written_down(
    service: Service, made: str, named: str
) -> None:
    repository = "default/tiny-wanda-50"
    asked = {"job": on(made), "repository": on(repository), "revision": on(repository, revision=made)}[named]
    job = (await service.client.post("/v1/jobs", json=asked)).json()
    assert job["recipe"]["model"] == {"source": "artifact", "id": repository, "revision": made}
    assert job["repository"] == "default/tiny-wanda-50-wanda-50"


async def test_what_does_not_fit_the_recipe_is_refused_before_it_is_queued(service: Service, made: str) -> None:
    asked = on(made) | {"sparsity": {"pattern": "3:5"}}
    assert await refusal(service, asked) == (422, "pattern_does_not_divide", "/sparsity/pattern")


async def test_another_tenants_model_is_not_found(service: Service, made: str) -> None:
    stranger = await make_tenant(service.database, "stranger")
    key = await make_key(service.database, stranger, service.keyring)
    async with service.client_with(key) as client:
        for named in (made, "default/tiny-wanda-50"):
            answer = await client.post("/v1/jobs", json=on(named))
            assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")


async def test_a_model_that_is_not_there_says_why(service: Service, made: str) -> None:
    assert await refusal(service, on("job_0")) == (404, "model_not_found", "/model/id")
    assert await refusal(service, on("default/other")) == (404, "model_not_found", "/model/id")
    running = await make_job(service.database, service.tenant)
    assert await refusal(service, on(running.id)) == (409, "job_not_finished", "/model/id")
    await claim(service)
    assert await refusal(service, on(running.id)) == (409, "job_not_finished", "/model/id")
    assert await refusal(service, on(made, revision="main")) == (422, "validation_error", "/model")
    async with service.database.write() as session:
        await session.execute(delete(Artifact))
    assert await refusal(service, on(made)) == (410, "model_gone", "/model/id")


async def test_it_is_linked_from_the_store_on_this_disk(service: Service, made: str) -> None:
    store = open_store(service.settings.store_url)
    folder = await bring(service, made, store)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert (folder / "model.safetensors").stat().st_nlink == 2
    assert folder == await bring(service, made, store)


async def test_it_is_downloaded_from_a_bucket(
    service: Service, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "buckets" / "artifacts").mkdir(parents=True)
    with serve_s3(tmp_path / "buckets") as endpoint:
        async with open_store("s3://artifacts", endpoint=endpoint) as store:
            for blob in (tmp_path / "blobs").iterdir():
                await store.put_file(service.tenant.id, blob.name, blob)
            folder = await bring(service, made, store)
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "made" / name).read_bytes()


async def bring(service: Service, job_id: str, store: Store) -> Path:
    async with service.database.read() as session:
        snapshot = await artifact.find(session, service.tenant.id, Model(source="artifact", id=job_id))
    scratch = service.settings.work_folder / "scratch"
    return await artifact.fetch(snapshot, store, tenant_id=service.tenant.id, scratch=scratch, settings=service.settings)


async def test_bytes_that_changed_in_the_store_are_noticed(service: Service, made: str) -> None:
    blobs = [path for path in (service.settings.state_folder / "artifacts").rglob("*") if path.is_file()]
    largest = max(blobs, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    with pytest.raises(ProblemError, match="another digest") as caught:
        await bring(service, made, open_store(service.settings.store_url))
    assert caught.value.code == "model_file_corrupt"
    assert not artifact.folder_of(made, tenant_id=service.tenant.id, settings=service.settings).exists()


async def test_a_machine_keeps_it_while_it_is_kept_or_read(service: Service, made: str) -> None:
    async def unneeded() -> list[str]:
        async with service.database.read() as session:
            return list(await artifact.unneeded(session, [made, "job_0"]))

    assert await unneeded() == ["job_0"]
    await service.client.post("/v1/jobs", json=on(made))
    reader = await claim(service)
    async with service.database.write() as session:
        await session.execute(delete(Artifact))
    assert await unneeded() == ["job_0"]
    async with service.database.write() as session:
        job = await session.get_one(Job, reader.id)
        job.status, job.finished_at, job.lease_expires_at = "failed", clock.now(), None
    assert await unneeded() == ["job_0", made]
