"""Server-sent events (WHATWG HTML, section 9.2): how they look on the line, and the answer that carries them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

MEDIA_TYPE = "text/event-stream"
HEARTBEAT = b":\n\n"
# A client that takes nothing for so long is dropped; it can resume where it was.
SEND_SECONDS = 20.0

_HEADERS: Mapping[str, str] = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def frame(id_: int, event: str, data: str) -> bytes:
    """One event; `data` is a single line."""
    return f"id: {id_}\nevent: {event}\ndata: {data}\n\n".encode()


def retry(milliseconds: int) -> bytes:
    """How long a client waits before it opens a stream again that broke."""
    return f"retry: {milliseconds}\n\n".encode()


def is_wanted(accept: str) -> bool:
    """Whether a client that sends this `Accept` would rather have a stream of events than JSON."""
    weights = dict(map(_weight, accept.lower().split(",")))
    wanted = weights.get(MEDIA_TYPE, 0.0)
    return wanted > 0 and wanted >= weights.get("application/json", 0.0)


def _weight(media_range: str) -> tuple[str, float]:
    name, *parameters = (part.strip() for part in media_range.split(";"))
    given = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
    try:
        return name, float(given)
    except ValueError:
        return name, 0.0


class EventStream(StreamingResponse):
    """An answer that goes on until `frames` ends or the client leaves; `on_end` is called then, whatever ended it."""

    media_type = MEDIA_TYPE

    def __init__(self, frames: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(frames, headers=_HEADERS)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()

    async def stream_response(self, send: Send) -> None:
        """As the base class, but with a limit on how long a client may take nothing. Raises ClientDisconnect then."""

        async def send_soon(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        await super().stream_response(send_soon)
