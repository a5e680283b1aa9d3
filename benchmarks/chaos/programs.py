"""The programs of a service, each kept running as an orchestrator keeps it: started again when it dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESTART_SECONDS = 0.3


@dataclass(eq=False)
class Program:
    """One program. A thread starts it, and again when it ends, unless it is held."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    user: str | None = None
    folder: Path | None = None
    fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _held: threading.Event = field(default_factory=threading.Event, init=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False)

    def start(self) -> None:
        threading.Thread(target=self._keep_running, name=self.name).start()

    def _keep_running(self) -> None:
        while not self._over.is_set():
            if self._held.is_set():
                self._over.wait(0.02)
                continue
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.argv, env=dict(self.env), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
                    user=self.user, pass_fds=self.fds,
                )  # fmt: skip
            self.process.wait()
            self._over.wait(RESTART_SECONDS)

    def send(self, number: int) -> None:
        """A signal, to the program as it runs now."""
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def away(self, seconds: float, number: int = signal.SIGKILL) -> None:
        """Take it down, and let it start again after so many seconds."""
        self._held.set()
        self.send(number)
        time.sleep(seconds)
        self._held.clear()

    def stop(self) -> None:
        """For good: SIGTERM, and SIGKILL to one that does not mind."""
        self._over.set()
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        if self.process is not None:
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
                self.process.wait()


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def environment_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def parent_of(pid: int) -> int:
    """0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def processes_of(folder: Path) -> Iterator[int]:
    """Processes that work below a folder: their environment names it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and str(folder) in environment_of(int(entry.name)):
            yield int(entry.name)


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def eventually(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until `condition` holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} seconds")
        time.sleep(0.01)
