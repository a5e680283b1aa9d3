"""The client against the real service over real HTTP, on good lines and bad ones."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.jobs import claims
from app.jobs.events import LogLine
from app.kit import clock
from secateur import AsyncClient, Client, connection
from secateur._download import DownloadProgress
from secateur.errors import (
    ConflictError,
    CorruptDownloadError,
    InvalidRequestError,
    JobNotSucceededError,
    NotConfiguredError,
    NotFoundError,
    SecateurError,
    UnauthorizedError,
    UnreachableError,
    WaitTimeoutError,
)
from secateur.recipes import PruneRecipe
from secateur.schemas.jobs import Status
from tests.api.conftest import Service
from tests.api.jobs import body, make_job
from tests.api.work import claim, succeed
from tests.cutting_proxy import Line, cutting_proxy
from tests.servers import running

WEIGHTS = os.urandom(3_000_000)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def key(service: Service) -> str:
    return str(service.client.headers["authorization"]).removeprefix("Bearer ")


@pytest.fixture
def url(service: Service) -> str:
    return str(service.client.base_url)


@pytest.fixture
async def client(url: str, key: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(url, key) as client:
        yield client


@pytest.fixture
async def line(url: str) -> AsyncIterator[Line]:
    async with cutting_proxy(url) as line:
        yield line


@pytest.fixture
async def bad_client(line: Line, key: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(line.url, key) as client:
        yield client


FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "empty.txt": b"", "sub/folder.json": b"[1]"}


def read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Jobs


@pytest.mark.parametrize("recipe", [body(), PruneRecipe.model_validate(body())], ids=["mapping", "recipe"])
async def test_a_job_is_submitted_and_found_again(client: AsyncClient, recipe: Any) -> None:
    job = await client.jobs.create(recipe)
    assert job.status == Status.QUEUED
    found = await client.jobs.get(job.id)
    assert found.waiting is not None  # the answer to a submission does not wait for the place in line
    assert found.model_copy(update={"waiting": None}) == job


async def test_a_job_is_estimated(client: AsyncClient) -> None:
    found = await client.jobs.estimate(PruneRecipe.model_validate(body()))
    assert found.seconds.low < found.seconds.high
    assert [job async for job in client.jobs.list()] == []


async def test_the_list_goes_on_over_pages(client: AsyncClient, service: Service) -> None:
    made = [(await make_job(service.database, service.tenant)).id for _ in range(45)]
    assert [job.id async for job in client.jobs.list()] == made[::-1]
    assert [job.id async for job in client.jobs.list(status=["failed"])] == []


async def test_the_list_takes_every_filter(client: AsyncClient, service: Service) -> None:
    mine = await make_job(service.database, service.tenant, labels={"team": "search"})
    await make_job(service.database, service.tenant, labels={"team": "ads"})
    long_ago = clock.now() - timedelta(hours=1)
    found = client.jobs.list(
        status=["queued"], method="wanda", model="tiny", created_after=long_ago, metadata={"team": "search"}
    )
    assert [job.id async for job in found] == [mine.id]


async def test_cancel_may_be_repeated_and_retry_makes_a_new_job(client: AsyncClient) -> None:
    job = await client.jobs.create(body())
    assert (await client.jobs.cancel(job.id)).status == Status.CANCELLED
    assert (await client.jobs.cancel(job.id)).status == Status.CANCELLED
    again = await client.jobs.retry(job.id)
    assert (again.status, again.retry_of) == (Status.QUEUED, job.id)


async def test_events_go_on_over_pages(client: AsyncClient, service: Service) -> None:
    job = await client.jobs.create(body())
    attempt = (await claim(service)).attempt
    lines = [LogLine("info", f"line {number}") for number in range(250)]
    async with service.database.write() as session:
        await claims.record(session, job.id, attempt, stage=None, progress=None, logs=lines, at=clock.now())
    assert [event.seq async for event in client.jobs.events(job.id)] == list(range(1, 253))
    assert [event.message async for event in client.jobs.events(job.id, after=251)] == ["line 249"]


async def test_wait_returns_at_the_end_and_watch_tells_the_way(client: AsyncClient, service: Service) -> None:
    job = await client.jobs.create(body())

    queued, begun = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await queued.wait()
        attempt = (await claim(service)).attempt
        for done in (1, 2):
            if done == 2:
                await begun.wait()
            progress = {"done": done, "total": 2, "unit": "blocks", "eta_seconds": 1}
            async with service.database.write() as session:
                await claims.record(session, job.id, attempt, stage="pruning", progress=progress, logs=[], at=clock.now())
        async with service.database.write() as session:
            await claims.succeed(session, job.id, attempt, metrics={}, report={}, artifacts=[], at=clock.now())

    async def watch() -> list[tuple[str, int]]:
        told: list[tuple[str, int]] = []
        async for seen in client.jobs.watch(job.id):
            told.append((seen.status, seen.progress.done if seen.progress else 0))
            queued.set()
            if told[-1] == ("running", 1):
                begun.set()
        return told

    seen, ended, _ = await asyncio.wait_for(asyncio.gather(watch(), client.jobs.wait(job.id), work()), 60)
    assert ended.status == Status.SUCCEEDED
    assert seen[0] == ("queued", 0)
    assert ("running", 1) in seen
    assert seen[-1][0] == "succeeded"


async def test_wait_gives_up_when_its_time_is_over(client: AsyncClient) -> None:
    job = await client.jobs.create(body())
    with pytest.raises(WaitTimeoutError, match=r"still queued after 0\.6 seconds"):
        await client.jobs.wait(job.id, timeout=0.6)


async def test_report_and_methods_and_models(client: AsyncClient, service: Service, tmp_path: Path) -> None:
    job_id = await succeed(service, tmp_path, FILES)
    assert await client.jobs.report(job_id) == {"blocks": []}
    assert {file.name for file in await client.jobs.artifacts(job_id)} == set(FILES)
    assert [one.outcome for one in await client.jobs.attempts(job_id)] == ["succeeded"]
    await client.jobs.delete(job_id)
    assert (await client.jobs.get(job_id)).deleted_at is not None
    assert {"magnitude", "wanda", "sparsegpt"} <= {method.name for method in await client.methods()}
    assert [(model.id, model.source) async for model in client.models()] == [
        ("tiny", "local"),
        ("default/tiny-wanda-50", "artifact"),
    ]


async def test_the_blocking_client_does_the_same(url: str, key: str, service: Service, tmp_path: Path) -> None:
    job_id = await succeed(service, tmp_path, FILES)

    def talk() -> None:
        with Client(url, key) as client:
            assert client.jobs.wait(job_id).status == Status.SUCCEEDED
            assert [job.id for job in client.jobs.list()] == [job_id]
            assert [job.status for job in client.jobs.watch(job_id)] == [Status.SUCCEEDED]
            assert read(client.jobs.download(job_id, tmp_path / "out")) == FILES
            with pytest.raises(NotFoundError):
                client.jobs.get("job_none")

    await asyncio.to_thread(talk)


# Errors


async def test_a_problem_is_an_error_of_its_kind(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError) as invalid:
        await client.jobs.create(body(sparsity={"target": 1.5}))
    assert invalid.value.code == "validation_error"
    assert [fault.pointer for fault in invalid.value.faults] == ["/sparsity/target"]
    assert invalid.value.request_id
    with pytest.raises(NotFoundError) as missing:
        await client.jobs.create(body(model={"source": "local", "id": "none"}))
    assert (missing.value.code, missing.value.status) == ("model_not_found", 404)
    assert missing.value.hint
    job = await client.jobs.create(body())
    with pytest.raises(ConflictError):
        await client.jobs.retry(job.id)


async def test_a_wrong_key_is_unauthorized(url: str) -> None:
    async with AsyncClient(url, "sct_wrong") as client:
        with pytest.raises(UnauthorizedError):
            await client.methods()


async def test_an_id_cannot_lead_to_another_address(client: AsyncClient) -> None:
    with pytest.raises(NotFoundError):
        await client.jobs.get("../methods")


async def test_nobody_there_is_told_as_such() -> None:
    async with AsyncClient("http://127.0.0.1:9", "sct_any") as client:
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9"):
            await client.methods()


# Bad lines


async def test_a_lost_answer_does_not_make_a_second_job(bad_client: AsyncClient, client: AsyncClient, line: Line) -> None:
    line.cuts, line.after = 2, 5
    job = await bad_client.jobs.create(body())
    assert line.connections == 3
    assert [one.id async for one in client.jobs.list()] == [job.id]


async def test_a_line_that_stays_bad_is_given_up(bad_client: AsyncClient, line: Line) -> None:
    line.cuts = 100
    with pytest.raises(UnreachableError):
        await bad_client.methods()
    assert line.connections == 4


async def test_a_download_that_is_cut_goes_on_where_it_was(
    bad_client: AsyncClient, line: Line, service: Service, tmp_path: Path
) -> None:
    job_id = await succeed(service, tmp_path, FILES)
    line.cuts, line.after = 3, 900_000
    folder = await bad_client.jobs.download(job_id, tmp_path / "out")
    assert line.connections == 4
    assert read(folder) == FILES


async def test_what_an_earlier_download_left_is_not_asked_for_again(
    client: AsyncClient, service: Service, tmp_path: Path
) -> None:
    job_id = await succeed(service, tmp_path, FILES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.part").write_bytes(WEIGHTS[:2_900_000])
    seen: list[DownloadProgress] = []
    await client.jobs.download(job_id, tmp_path / "out", files=["model.safetensors"], on_progress=seen.append)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    assert min(progress.done for progress in seen) > 2_900_000
    assert seen[-1].done == seen[-1].total == len(WEIGHTS)


async def test_a_part_of_another_file_is_thrown_away(client: AsyncClient, service: Service, tmp_path: Path) -> None:
    job_id = await succeed(service, tmp_path, FILES)
    (tmp_path / "out").mkdir()
    for leftover in (b"x" * 1000, b"x" * 4_000_000, b"x" * len(WEIGHTS)):
        (tmp_path / "out" / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "out" / "model.safetensors.part").write_bytes(leftover)
        await client.jobs.download(job_id, tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


async def test_a_file_that_is_there_whole_is_left_alone_and_a_wrong_one_replaced(
    client: AsyncClient, service: Service, tmp_path: Path
) -> None:
    job_id = await succeed(service, tmp_path, FILES)
    folder = await client.jobs.download(job_id, tmp_path / "out")
    before = {name: (folder / name).stat().st_ino for name in FILES}
    (tmp_path / "out" / "config.json").write_bytes(b"[]")
    await client.jobs.download(job_id, tmp_path / "out")
    assert {name for name in FILES if (folder / name).stat().st_ino != before[name]} == {"config.json"}
    assert (tmp_path / "out" / "config.json").read_bytes() == FILES["config.json"]


async def test_bytes_that_are_not_the_jobs_are_refused(client: AsyncClient, service: Service, tmp_path: Path) -> None:
    job_id = await succeed(service, tmp_path, FILES)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    (blob,) = Path(service.settings.state_folder, "artifacts").rglob(sha256)
    blob.write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    with pytest.raises(CorruptDownloadError):
        await client.jobs.download(job_id, tmp_path / "out", files=["model.safetensors"])
    assert not list((tmp_path / "out").iterdir())


async def test_a_job_that_has_no_files_says_so(client: AsyncClient, tmp_path: Path) -> None:
    job = await client.jobs.create(body())
    with pytest.raises(JobNotSucceededError, match="queued"):
        await client.jobs.download(job.id, tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil"])
async def test_a_name_that_leads_out_of_the_folder_is_refused(
    client: AsyncClient, service: Service, tmp_path: Path, name: str
) -> None:
    job_id = await succeed(service, tmp_path, {name: b"evil"})
    with pytest.raises(SecateurError, match="outside"):
        await client.jobs.download(job_id, tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("evil*"))


# Where the service is


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_URL", "https://prune.example/")
    monkeypatch.setenv("SECATEUR_API_KEY", "sct_env")
    found = connection.find()
    assert (found.url, found.key) == ("https://prune.example", "sct_env")
    assert "sct_env" not in repr(found)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a `secateur up`, named by the environment, which names nothing else."""
    monkeypatch.delenv("SECATEUR_URL", raising=False)
    monkeypatch.delenv("SECATEUR_API_KEY", raising=False)
    monkeypatch.setenv("SECATEUR_STATE", str(tmp_path))
    (tmp_path / "admin.key").write_text("sct_local\n")
    document = {"url": "http://127.0.0.1:8000", "key_file": str(tmp_path / "admin.key")}
    (tmp_path / "service.json").write_text(json.dumps(document))
    return tmp_path


def test_a_service_on_this_machine_is_found_and_its_key_goes_nowhere_else(state: Path) -> None:
    with running(state):
        assert connection.find() == connection.Connection("http://127.0.0.1:8000", "sct_local")
        with pytest.raises(NotConfiguredError, match="No API key"):
            connection.find("https://elsewhere.example")
    (state / "service.json").unlink()
    with pytest.raises(NotConfiguredError, match="secateur up"):
        connection.find()


def test_a_service_that_was_killed_is_not_taken_for_one_that_runs(state: Path) -> None:
    """Its note stays behind, and its port may be another's by now, which must not be shown the key."""
    with running(state):
        pass
    with pytest.raises(NotConfiguredError, match="is not running"):
        connection.find()
    with pytest.raises(NotConfiguredError, match="No API key"):
        connection.find("http://127.0.0.1:8000")


def test_the_state_folder_is_not_read_by_those_who_need_nothing_of_it(state: Path) -> None:
    (state / "service.json").write_text("{")
    with running(state):
        assert connection.find("https://prune.example", "sct_mine").key == "sct_mine"
        with pytest.raises(NotConfiguredError, match=r"service\.json"):
            connection.find()


def test_the_client_needs_neither_torch_nor_the_server() -> None:
    heavy = "torch transformers numpy fastapi sqlalchemy celery uvicorn huggingface_hub alembic app workers"
    program = (
        "import sys; from secateur import AsyncClient, Client; import secateur.cli; Client('http://x', 'k');"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
