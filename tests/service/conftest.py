"""A whole service, started by `secateur up` as a user would, with clocks that run fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from secateur import Client
from secateur.schemas.jobs import TERMINAL, Job
from tests.tiny_models import make_llama

FAST = {
    "SECATEUR_WORKER_LEASE_SECONDS": "6",
    "SECATEUR_WORKER_HEARTBEAT_SECONDS": "0.3",
    "SECATEUR_SCHEDULER_RELAY_SECONDS": "0.3",
    "SECATEUR_SCHEDULER_REAP_SECONDS": "0.3",
    "SECATEUR_SCHEDULER_PRESENCE_SECONDS": "2",
    "SECATEUR_SCHEDULER_RING_AGAIN_SECONDS": "2",
}


@dataclass
class Service:
    """A service that is up, a client of it, and where it keeps its state."""

    client: Client
    state: Path
    url: str
    key: str
    process: subprocess.Popen[str]

    def pid_of(self, program: str) -> int:
        """The id of the direct child of `secateur up` whose command line holds `program`."""
        (pid,) = (pid for pid in children_of(self.process.pid) if program in command_line(pid))
        return pid

    def wait(self, job_id: str, until: Callable[[Job], bool], seconds: float = 120) -> Job:
        """The job, once `until` holds for it."""
        deadline = time.monotonic() + seconds
        while not until(job := self.client.jobs.get(job_id)):
            assert time.monotonic() < deadline, f"still {job.status}, {job.stage}, {job.progress}"
            assert job.status not in TERMINAL, f"ended as {job.status}: {job.error}"
            time.sleep(0.05)
        return job

    def finish(self, job_id: str, seconds: float = 120) -> Job:
        """The job, once it has ended."""
        return self.wait(job_id, lambda job: job.status in TERMINAL, seconds)

    def runners(self) -> list[int]:
        """The processes that prune, now."""
        return [pid for pid in descendants_of(self.process.pid) if "workers.runner" in command_line(pid)]

    def let_go(self, *job_ids: str, seconds: float = 15) -> None:
        """Wait until nothing of ended jobs is left: a client sees the end before the worker has tidied up."""
        folders = [self.state / "work" / job_id for job_id in job_ids]
        deadline = time.monotonic() + seconds
        while left := [*filter(Path.exists, folders), *self.runners()]:
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.05)


@contextmanager
def up(state: Path, models: Path, **environment: str) -> Iterator[Service]:
    """`secateur up` on a free port; taken down, by SIGTERM, at the end of the block."""
    folders = ["--state", str(state), "--models", str(models)]
    command = [sys.executable, "-m", "secateur.cli", "up", "--json", "--port", "0", *folders]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **FAST, **environment}) as process:
        assert process.stdout is not None
        try:
            address = json.loads(process.stdout.readline())
            key = Path(address["key_file"]).read_text().strip()
            with Client(address["url"], api_key=key) as client:
                yield Service(client, state, address["url"], key, process)
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def second_worker(service: Service) -> Iterator[None]:
    """Another worker of the same service."""
    pairs = Path(f"/proc/{service.pid_of('workers.celery_app')}/environ").read_text().split("\0")
    environment = dict(pair.split("=", 1) for pair in pairs if pair)
    options = ["-P", "prefork", "-c", "1", "-n", "second@%h", "--without-gossip", "--without-mingle"]
    command = [sys.executable, "-m", "celery", "-A", "workers.celery_app", "worker", *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with `tiny`; `slow`, which keeps a worker busy for a while; and `broken`, which has a NaN in block 1."""
    root = tmp_path_factory.mktemp("models")
    make_llama(root / "tiny")
    make_llama(root / "slow", hidden=256, intermediate=1024, layers=24, heads=8, key_value_heads=4)
    broken = make_llama(root / "broken") / "model.safetensors"
    tensors = load_file(broken)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken, metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Service]:
    with up(tmp_path_factory.mktemp("state"), models) as running:
        yield running


def recipe(model: str = "tiny", *, samples: int = 4, method: str = "wanda", **more: Any) -> dict[str, Any]:
    """The body of a job on one of the models above."""
    return {
        "kind": "prune",
        "model": {"source": "local", "id": model},
        "method": {"name": method},
        "sparsity": {"target": 0.5},
        "calibration": {"samples": samples, "sequence_length": 128},
        **more,
    }


def pruned(job: Job) -> int:
    """How many blocks of the job are pruned, as far as it has told; 0 outside that stage."""
    return job.progress.done if job.stage == "pruning" and job.progress else 0


def weights_of(job: Job) -> dict[str, str]:
    """The digests of the job's weights; its report and card tell how long it took."""
    return {file.name: file.sha256 for file in job.artifacts if file.name.endswith(".safetensors")}


def children_of(pid: int) -> list[int]:
    """The direct children of a process; none if it is gone."""
    return [int(child) for child in _told_by(Path(f"/proc/{pid}/task/{pid}/children")).split()]


def descendants_of(pid: int) -> list[int]:
    """All processes below a process."""
    return [each for child in children_of(pid) for each in (child, *descendants_of(child))]


def command_line(pid: int) -> str:
    """The command line of a process; empty if it is gone."""
    return _told_by(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")


def _told_by(file: Path) -> str:
    """What the kernel says of a process; nothing if it ends before it is asked, or meanwhile."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
