"""A real MLflow server on loopback, on SQLite, which serves its artifacts itself.

MLflow pins older versions of what we build on, so it lives in an environment of its own: `make mlflow` makes it, in about a
minute, beside the other packages. `SECATEUR_TEST_MLFLOW` names another `mlflow` program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tests.servers import free_port

PROGRAM = Path(os.environ.get("SECATEUR_TEST_MLFLOW", Path(sys.prefix) / "mlflow" / "bin" / "mlflow"))
_READY_SECONDS = 90.0


@contextmanager
def serve_mlflow(state: Path, port: int | None = None) -> Iterator[str]:
    """The URL of a server that keeps everything in `state`, so that it can be stopped and started again."""
    port = port or free_port()
    state.mkdir(exist_ok=True)
    command = [
        str(PROGRAM), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{state}/mlflow.sqlite", "--artifacts-destination", str(state / "artifacts"),
    ]  # fmt: skip
    # Its own packages, not ours; and nothing is told to anybody.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "MLFLOW_"))}
    env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
    with (
        (state / "log").open("ab") as log,
        subprocess.Popen(command, cwd=state, stdout=log, stderr=log, env=env, start_new_session=True) as server,
    ):
        try:
            _wait(f"http://127.0.0.1:{port}", server, state / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, 15)
            server.wait(30)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            urlopen(f"{url}/health", timeout=2).close()
        except (URLError, OSError):
            if time.monotonic() > deadline or server.poll() is not None:
                raise RuntimeError(f"MLflow did not start: {log.read_text()[-3000:]}") from None
            time.sleep(0.1)
        else:
            return
