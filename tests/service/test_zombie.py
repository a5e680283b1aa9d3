"""A worker that was stopped past its lease and wakes up again can write nothing: the job is another's by then."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from secateur.schemas.jobs import Job
from tests.service.conftest import Service, command_line, descendants_of, pruned, recipe, second_worker, weights_of


def runners(pid: int) -> list[int]:
    return [child for child in descendants_of(pid) if "workers.runner" in command_line(child)]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def freeze(pids: list[int], database: Path) -> None:
    """Stop processes, but not in the middle of a transaction: SQLite's one write lock would be stopped with them."""
    while True:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        with closing(sqlite3.connect(database, timeout=1, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                for pid in reversed(pids):
                    os.kill(pid, signal.SIGCONT)
                time.sleep(0.05)
                continue
            connection.execute("ROLLBACK")
        return


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> Job:
    return service.finish(service.client.jobs.create(recipe("slow", samples=32)).id)


@pytest.mark.parametrize("stopped", ["supervisor", "supervisor and runner"])
def test_zombie_writes_nothing(service: Service, undisturbed: Job, stopped: str) -> None:
    job = service.client.jobs.create(recipe("slow", samples=32))
    service.wait(job.id, lambda job: pruned(job) >= 2)
    first = service.pid_of("workers.celery_app")
    (runner,) = runners(first)
    supervisor = parent_of(runner)
    frozen = [supervisor, runner] if stopped == "supervisor and runner" else [supervisor]
    freeze(frozen, service.state / "secateur.sqlite")
    with second_worker(service):
        try:
            service.wait(job.id, lambda job: job.attempt == 2 and pruned(job) >= 3)
        finally:
            for pid in reversed(frozen):
                os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 15
        while command_line(runner):  # the zombie sees that the job is not its own, and ends its child
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ended = service.finish(job.id)
    assert (ended.status, ended.attempt) == ("succeeded", 2)
    events = list(service.client.jobs.events(job.id))
    statuses = [event.seq for event in events if event.type == "status"]
    assert len(statuses) == 5  # queued, running, queued, running, succeeded
    done = [event.data["done"] for event in events if event.type == "progress" and event.seq > statuses[3]]
    assert done == sorted(set(done))  # nobody but the second attempt tells how far it is
    assert weights_of(ended) == weights_of(undisturbed)
