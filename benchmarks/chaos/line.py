"""The line to the artifact store: it can be held, broken off, and answer 503 in the store's place."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

_REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Line:
    """A TCP proxy on loopback, a thread a direction."""

    def __init__(self, target: str) -> None:
        where = urlsplit(target)
        self._target = (where.hostname or "127.0.0.1", where.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._refusing = threading.Event()
        self._flowing = threading.Event()
        self._flowing.set()
        self._holders = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        """Answer 503 to everybody, from now on."""
        self._refusing.set()
        self.cut()

    def accept(self) -> None:
        """Refuse nobody any more."""
        self._refusing.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no upload through for as long as the block lasts; several may hold the line."""
        with self._lock:
            self._holders += 1
            self._flowing.clear()
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._flowing.set()

    def cut(self) -> None:
        """Break off what is open."""
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            if self._refusing.is_set():
                near.recv(1 << 16)
                near.sendall(_REFUSAL)
                return
            with socket.create_connection(self._target) as far:
                with self._lock:
                    self._open |= {near, far}
                answers = threading.Thread(target=self._pass_on, args=(far, near, False), daemon=True)
                answers.start()
                self._pass_on(near, far, True)
                answers.join()
                with self._lock:
                    self._open -= {near, far}

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                if is_request and piece.startswith((b"PUT ", b"POST ")):
                    self._flowing.wait()
                sink.sendall(piece)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
