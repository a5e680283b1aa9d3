"""Tells requests that take long, on purpose, that the process is to stop: a server waits for its open requests to end."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def watch_for_stop() -> Iterator[asyncio.Event]:
    """An event that is set at SIGTERM or SIGINT; the server's own handlers go on to do their work."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def before(handler: Handler) -> Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(stopping.set)
            handler(number, frame)

        return handle

    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number, handler in handlers.items():
        signal.signal(number, before(handler))
    try:
        yield stopping
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
