"""A worker is told to stop in the middle of a job: its block is finished, nothing is lost, another one goes on."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import time
from collections.abc import Mapping
from functools import partial

from secateur.schemas.jobs import Job
from tests.service.conftest import Service, command_line, pruned, recipe, weights_of

BLOCKS = 24


def row_of(service: Service, job_id: str) -> Mapping[str, int]:
    with sqlite3.connect(f"file:{service.state / 'secateur.sqlite'}?mode=ro", uri=True) as connection:
        connection.row_factory = sqlite3.Row
        row = connection.execute("SELECT attempt, barren_attempts, blocks_done FROM jobs WHERE id = ?", [job_id]).fetchone()
    connection.close()
    return dict(row)


def begun(attempt: int, blocks: int, job: Job) -> bool:
    return job.attempt == attempt and pruned(job) >= blocks


def drain(service: Service) -> None:
    """SIGTERM to the worker, as a deploy sends it; `secateur up` starts another."""
    worker = service.pid_of("workers.celery_app")
    os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while command_line(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_drained_job_goes_on_at_another_worker_without_a_lost_block_and_gives_the_same_bytes(service: Service) -> None:
    undisturbed = service.finish(service.client.jobs.create(recipe("slow", samples=64)).id)
    job = service.client.jobs.create(recipe("slow", samples=64))
    for attempt, blocks in ((1, 2), (2, 8)):
        before = service.wait(job.id, partial(begun, attempt, blocks))
        drain(service)
        row = row_of(service, job.id)
        assert row["blocks_done"] > pruned(before)  # the block that was under way at the signal
        assert row["barren_attempts"] <= 1  # that of the attempt which has begun by now; the drained one is not counted
    ended = service.finish(job.id)
    assert (ended.status, ended.attempt) == ("succeeded", 3)
    assert weights_of(ended) == weights_of(undisturbed)
    events = list(service.client.jobs.events(job.id))
    statuses = [event.data["status"] for event in events if event.type == "status"]
    assert statuses == ["queued", "running", "queued", "running", "queued", "running", "succeeded"]
    released = next(event.seq for event in events if "told to stop" in event.message)
    done = [event.data["done"] for event in events if event.seq < released and event.type == "progress"]
    taken = [int(found[1]) for event in events if (found := re.search(r"finished (\d+) blocks", event.message))]
    assert taken[0] == done[-1]
    assert done[-1] < taken[1] < BLOCKS
