"""Open event streams on one API process: how soon an event reaches all of them, and whether memory stays flat.

`python -m benchmarks.streams [--seconds 600]`: a real API process on PostgreSQL; clients that speak HTTP over sockets;
events that are written as a worker writes them. Two runs: each stream follows a job of its own, and all follow one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from sqlalchemy import select

from app.accounts.models import Tenant
from app.jobs import claims
from app.jobs.events import LogLine
from app.jobs.models import Job
from app.kit import clock
from app.kit.db import Database
from app.prepare import prepare
from app.settings import DatabaseSettings, Settings
from tests.api.jobs import make_job
from tests.servers import free_port, serve_postgresql, serve_valkey

RESULTS = Path(__file__).parent / "results" / "streams.json"
STREAMS = 500
SETTLE_SECONDS = 5.0


@dataclass
class Heard:
    """When the events came: for each (by the moment it was written), how long it took to each stream."""

    delays: dict[float, list[float]] = field(default_factory=dict)

    def hear(self, line: bytes) -> None:
        message = json.loads(line.removeprefix(b"data: "))["message"]
        if message.startswith("written at "):
            written = float(message.removeprefix("written at "))
            self.delays.setdefault(written, []).append(time.monotonic() - written)

    def summary(self) -> dict[str, Any]:
        every = sorted(delay for delays in self.delays.values() for delay in delays)
        return {
            "deliveries": len(every),
            "p50_seconds": round(every[len(every) // 2], 3),
            "p99_seconds": round(every[len(every) * 99 // 100], 3),
            "slowest_seconds": round(every[-1], 3),
        }


@dataclass(frozen=True)
class Api:
    """A process that serves: where, its id, and a key to it."""

    port: int
    pid: int
    key: str

    def resident_bytes(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

    def processor_seconds(self) -> float:
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def follow(api: Api, job_id: str, heard: Heard) -> None:
    """Hold a stream open and note what comes, until cancelled. Raises ConnectionError if the stream ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    fields = ("Host: x", "Accept: text/event-stream", f"Authorization: Bearer {api.key}")
    head = "\r\n".join((f"GET /v1/jobs/{job_id}/events HTTP/1.1", *fields, "", ""))
    writer.write(head.encode())
    status = await reader.readline()
    if b" 200 " not in status:
        raise ConnectionError(status.decode())
    while line := await reader.readline():
        if line.startswith(b"data: "):
            heard.hear(line)
    raise ConnectionError("a stream has ended")


async def write_events(database: Database, jobs: Sequence[Job], *, seconds: float, pause: float) -> int:
    """Write an event to each of the jobs again and again, as a worker does; how many were written."""
    deadline, written = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        for job in jobs:
            line = [LogLine("info", f"written at {time.monotonic()}")]
            async with database.write() as session:
                kept = await claims.record(
                    session, job.id, job.attempt, stage=None, progress=None, logs=line, at=clock.now()
                )
            assert kept
            written += 1
            await asyncio.sleep(pause)
    return written


async def measure(api: Api, database: Database, jobs: Sequence[Job], seconds: float) -> dict[str, Any]:
    """One run: STREAMS streams over `jobs`, an event about every second."""
    heard = Heard()
    streams = [asyncio.create_task(follow(api, jobs[index % len(jobs)].id, heard)) for index in range(STREAMS)]
    await asyncio.sleep(SETTLE_SECONDS)
    began, processor = api.resident_bytes(), api.processor_seconds()
    written = await write_events(database, jobs, seconds=seconds, pause=1.0 if len(jobs) == 1 else 0.05)
    await asyncio.sleep(2)
    ended, used = api.resident_bytes(), api.processor_seconds() - processor
    broken = [task.exception() for task in streams if task.done()]
    for task in streams:
        task.cancel()
    await asyncio.wait(streams)
    return {
        "streams": STREAMS,
        "jobs": len(jobs),
        "seconds": seconds,
        "events": written,
        "streams_broken": len(broken),
        "events_that_missed_a_stream": sum(len(delays) < STREAMS // len(jobs) for delays in heard.delays.values()),
        **heard.summary(),
        "memory_bytes_at_start": began,
        "memory_bytes_at_end": ended,
        "processor_share": round(used / seconds, 3),
    }


@contextmanager
def serve(state: Path, database_url: str, broker_url: str) -> Iterator[Api]:
    """An API process, once it answers."""
    port = free_port()
    environment = {
        **os.environ,
        "SECATEUR_STATE": str(state),
        "SECATEUR_DATABASE_URL": database_url,
        "SECATEUR_BROKER_URL": broker_url,
        "SECATEUR_HTTP_MAX_STREAMS_PER_TENANT": str(STREAMS),
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port), "--no-access-log"]
    with (
        (state / "api.log").open("wb") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            while not answers(f"http://127.0.0.1:{port}/livez"):
                time.sleep(0.2)
            yield Api(port, process.pid, (state / "admin.key").read_text().strip())
        finally:
            process.terminate()


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


async def running_jobs(database: Database, count: int) -> list[Job]:
    """New jobs of the tenant, each claimed, so that events may be written to them."""
    async with database.read() as session:
        tenant = (await session.scalars(select(Tenant))).one()
    claimed = []
    for _ in range(count):
        await make_job(database, tenant)
        async with database.write() as session:
            day = timedelta(days=1)
            claimed.append(await claims.claim(session, queues=["cpu"], worker="w", lease=day, at=clock.now()))
    return [job for job in claimed if job is not None]


async def measure_all(api: Api, database_url: str, seconds: float) -> list[dict[str, Any]]:
    database, results = Database(database_url), []
    for jobs, length in ((STREAMS, min(seconds, 60.0)), (1, seconds)):
        results.append(await measure(api, database, await running_jobs(database, jobs), length))
        print(json.dumps(results[-1], indent=2), flush=True)
    await database.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure open event streams.")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="How long the run on one job lasts; 600 for the record."
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve_postgresql() as database_url, serve_valkey() as broker_url:
        state = Path(folder)
        asyncio.run(prepare(Settings(state=state, database=DatabaseSettings(url=database_url))))
        with serve(state, database_url, broker_url) as api:
            results = asyncio.run(measure_all(api, database_url, arguments.seconds))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
