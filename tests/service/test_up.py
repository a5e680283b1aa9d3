"""`secateur up`: one command, one service a state folder, restarts, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur import Client
from secateur.schemas.jobs import Job
from tests.service.conftest import Service, command_line, descendants_of, recipe, up


def test_second_up_on_the_same_state_says_so_and_stops(service: Service) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "secateur.cli", "up", "--state", service.state, "--port", "0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert "already" in second.stderr
    assert service.url in "".join(second.stderr.split())
    assert service.finish(service.client.jobs.create(recipe()).id).status == "succeeded"


def test_secrets_are_readable_by_their_owner_alone(service: Service) -> None:
    for name in ("admin.key", "keyring.json"):
        assert stat.S_IMODE((service.state / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("program", ["uvicorn", "workers.celery_app", "workers.scheduler", "valkey-server"])
def test_child_that_dies_is_started_again(service: Service, program: str) -> None:
    killed = service.pid_of(program)
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not any(program in command_line(pid) for pid in descendants_of(service.process.pid) if pid != killed):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert service.finish(service.client.jobs.create(recipe()).id).status == "succeeded"


def test_waiting_job_knows_its_place_and_its_worker(service: Service) -> None:
    first, second = [service.client.jobs.create(recipe("slow", samples=1024)) for _ in range(2)]

    def served(job: Job) -> bool:
        return job.waiting is not None and (job.queue, job.waiting.position, job.waiting.workers) == ("cpu", 1, 1)

    service.wait(second.id, served, seconds=30)
    for job in (second, first):
        service.client.jobs.cancel(job.id)
        service.finish(job.id)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_takes_everything_down_and_the_running_job_waits_for_the_next_start(
    tmp_path: Path, models: Path, number: signal.Signals
) -> None:
    with up(tmp_path, models) as service:
        job = service.client.jobs.create(recipe("slow", samples=256))
        service.wait(job.id, lambda each: each.stage == "pruning")
        everything = descendants_of(service.process.pid)
        assert len(everything) >= 6
        service.process.send_signal(number)
        service.process.wait(60)
    assert service.process.returncode == 0
    assert not [command_line(pid) for pid in everything if command_line(pid)]
    with up(tmp_path, models) as service:
        found = service.client.jobs.get(job.id)
        assert found.status in {"queued", "running"}
        assert [event.data["status"] for event in service.client.jobs.events(job.id) if event.type == "status"][:3] == [
            "queued", "running", "queued",
        ]  # fmt: skip
        service.client.jobs.cancel(job.id)
        assert service.finish(job.id).status == "cancelled"


def test_killed_up_takes_its_children_along(tmp_path: Path, models: Path) -> None:
    with up(tmp_path, models) as service:
        everything = descendants_of(service.process.pid)
        service.process.kill()
        service.process.wait()
        deadline = time.monotonic() + 10
        while [command_line(pid) for pid in everything if command_line(pid)]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_client_finds_the_embedded_service_by_its_state_folder(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECATEUR_URL", "SECATEUR_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SECATEUR_STATE", str(service.state))
    with Client() as client:
        assert {method.name for method in client.methods()} >= {"magnitude", "wanda", "sparsegpt"}
