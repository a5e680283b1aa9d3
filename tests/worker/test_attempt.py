"""How an attempt ends when something around it fails: the store, the disk, the child; and when it is told to stop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from app.artifacts.local import LocalStore
from app.jobs import claims
from app.jobs.models import Event, Job
from app.kit import clock
from app.kit.db import Database
from app.settings import Settings
from secateur.problems import ProblemError
from tests.api.jobs import make_job, make_tenant
from workers import drain, handover, supervisor
from workers.child import ChildLostError
from workers.supervisor import Attempt

CONTENT = b"pruned"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class MoodyStore(LocalStore):
    """A store that is away for the first `absences` uploads."""

    absences = 0

    async def put_file(self, tenant_id: str, sha256: str, path: Path) -> None:
        if self.absences:
            self.absences -= 1
            raise ProblemError("service_unavailable", "the store does not answer")
        await super().put_file(tenant_id, sha256, path)


@pytest.fixture
def settings(tmp_path: Path, sqlite_url: str) -> Settings:
    worker = {"heartbeat_seconds": 0.1, "patience_seconds": 5}
    return Settings.model_validate({"state": tmp_path / "state", "database": {"url": sqlite_url}, "worker": worker})


class Scene:
    """A claimed job and its attempt, whose children are played: what they return is `product`, or raised."""

    def __init__(self, settings: Settings, database: Database, store: MoodyStore, job: Job) -> None:
        self.database, self.store, self.job = database, store, job
        self.attempt = Attempt(job, settings, database, store)
        self.folder = settings.work_folder / job.id
        self.file = {"name": "model.safetensors", "size": len(CONTENT), "sha256": SHA256}
        self.raised: Exception | None = None
        self.seconds = 0.0

    async def child(self, module: str, order: Mapping[str, Any], _env: Mapping[str, str]) -> Mapping[str, Any]:
        if module == "workers.fetcher":
            return {"source": "/nowhere"}
        if self.raised:
            raise self.raised
        await asyncio.sleep(self.seconds)
        (Path(order["output"]) / "model.safetensors").write_bytes(CONTENT)
        return {"metrics": {"sparsity": 0.5}, "report": {}, "files": [self.file]}

    async def have_last_attempt(self) -> None:
        """The job's attempts before this one have finished nothing."""
        async with self.database.write() as session:
            (await session.get_one(Job, self.job.id)).barren_attempts = 3

    async def end(self) -> Job:
        await asyncio.wait_for(self.attempt.run(), 20)
        async with self.database.read() as session:
            return await session.get_one(Job, self.job.id)


@pytest.fixture
async def scene(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    database = Database(settings.database_url)
    tenant = await make_tenant(database)
    await make_job(database, tenant)
    async with database.write() as session:
        lease = timedelta(seconds=30)
        job = await claims.claim(session, queues=["cpu"], worker="w", lease=lease, at=clock.now())
    assert job is not None
    scene = Scene(settings, database, MoodyStore(tmp_path / "store"), job)
    monkeypatch.setattr(scene.attempt, "_child", scene.child)
    yield scene
    await database.close()


async def test_store_that_is_away_for_a_moment_costs_only_that_moment(scene: Scene) -> None:
    scene.store.absences = 2
    job = await scene.end()
    assert job.status == "succeeded"
    assert await scene.store.exists(job.tenant_id, SHA256)
    assert not scene.folder.exists()


async def test_store_that_stays_away_lets_the_job_wait_for_another_attempt(scene: Scene) -> None:
    scene.store.absences = 100
    assert (await scene.end()).status == "queued"
    assert scene.folder.is_dir()


async def test_store_that_stays_away_fails_the_last_attempt_with_its_own_problem(scene: Scene) -> None:
    await scene.have_last_attempt()
    scene.store.absences = 100
    job = await scene.end()
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["retryable"]) == ("service_unavailable", True)


async def test_database_that_blinks_while_an_attempt_asks_it_costs_only_that_moment(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials, blinks = scene.attempt._credentials, iter([True])

    async def blinking() -> dict[str, Any]:
        if next(blinks, False):
            raise OperationalError("SELECT", {}, ConnectionError("terminating connection"))
        return await credentials()

    monkeypatch.setattr(scene.attempt, "_credentials", blinking)
    assert (await scene.end()).status == "succeeded"


async def test_what_a_child_said_last_is_written_down_although_the_database_blinked(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, blinks = scene.attempt._record, iter([True, True])

    async def blinking() -> None:
        said_last = any(message.get("stage") == "uploading" for message in scene.attempt._unwritten)
        if said_last and next(blinks, False):
            raise OperationalError("INSERT", {}, ConnectionError("terminating connection"))
        await record()

    monkeypatch.setattr(scene.attempt, "_record", blinking)
    assert (await scene.end()).status == "succeeded"
    async with scene.database.read() as session:
        events = await session.scalars(select(Event.data).where(Event.job_id == scene.job.id))
        assert "uploading" in [data.get("stage") for data in events]


@pytest.mark.parametrize("name", ["../../keyring.json", "/etc/passwd", "..", "a/b"])
async def test_run_cannot_name_a_file_outside_its_output(scene: Scene, name: str) -> None:
    scene.file["name"] = name
    job = await scene.end()
    assert job.error is not None
    assert job.error["code"] == "verification_failed"


async def test_lost_child_gives_its_lease_up_at_once_and_keeps_what_it_finished(scene: Scene) -> None:
    scene.raised = ChildLostError(-9)
    job = await scene.end()
    assert job.status == "running"
    assert job.lease_expires_at is not None
    assert job.lease_expires_at <= clock.now()
    assert (scene.folder / "1" / "output").is_dir()


async def test_full_disk_and_unforeseen_failures_are_told_as_what_they_are(scene: Scene) -> None:
    await scene.have_last_attempt()
    scene.raised = OSError(28, "No space left on device")
    job = await scene.end()
    assert job.error is not None
    assert job.error["code"] == "disk_full"


async def test_unforeseen_failure_fails_the_job_instead_of_losing_it(scene: Scene) -> None:
    scene.raised = KeyError("surprise")
    job = await scene.end()
    assert job.error is not None
    assert job.error["code"] == "internal_error"
    assert not scene.folder.exists()


async def test_drain_requeues_a_job_in_the_middle_and_keeps_what_it_finished(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.seconds = 60
    monkeypatch.setattr(drain, "under_way", lambda: True)
    assert (await scene.end()).status == "queued"
    assert scene.folder.is_dir()


async def test_drain_while_storing_waits_for_the_store(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.store.absences = 1
    monkeypatch.setattr(drain, "under_way", lambda: scene.attempt._stage == "uploading")
    assert (await scene.end()).status == "succeeded"


async def test_drain_has_an_end_even_if_the_store_has_none(
    scene: Scene, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.store.absences = 100
    monkeypatch.setitem(settings.worker.__dict__, "drain_seconds", 0.3)
    monkeypatch.setattr(drain, "under_way", lambda: scene.attempt._stage == "uploading")
    assert (await scene.end()).status == "queued"


async def test_result_of_an_attempt_that_was_lost_while_storing_is_stored_by_the_next(scene: Scene) -> None:
    lost = scene.folder / str(scene.job.attempt)
    (lost / "output").mkdir(parents=True)
    (lost / "output" / "model.safetensors").write_bytes(CONTENT)
    handover.leave(lost, {"metrics": {"sparsity": 0.5}, "report": {}, "files": [scene.file]})
    scene.job.attempt += 1
    async with scene.database.write() as session:
        (await session.get_one(Job, scene.job.id)).attempt += 1
    scene.raised = AssertionError("nothing is pruned again")
    assert (await scene.end()).status == "succeeded"
    assert await scene.store.exists(scene.job.tenant_id, SHA256)


@pytest.mark.parametrize("damage", [b"other bytes", None])
async def test_damaged_result_is_not_taken_over(tmp_path: Path, scene: Scene, damage: bytes | None) -> None:
    (tmp_path / "output").mkdir()
    handover.leave(tmp_path, {"files": [scene.file]})
    if damage:
        (tmp_path / "output" / "model.safetensors").write_bytes(damage)
    assert handover.find([tmp_path / "nowhere", tmp_path]) is None


async def test_cancel_beats_a_result_that_comes_too_late(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancelled_meanwhile(*_: Any) -> None:
        async with scene.database.write() as session:
            job = await session.get_one(Job, scene.job.id)
            job.status = "cancelling"

    monkeypatch.setattr(scene.store, "put_file", cancelled_meanwhile)
    monkeypatch.setattr(supervisor, "TICK_SECONDS", 5)
    job = await scene.end()
    assert job.status == "cancelled"
    assert not scene.folder.exists()
