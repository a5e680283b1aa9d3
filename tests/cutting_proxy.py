"""A TCP proxy on loopback that breaks connections off in the middle: a bad line, in a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Line:
    """The line to a server. The next `cuts` connections are cut when `after` bytes of the answers have passed."""

    url: str = ""
    cuts: int = 0
    after: int = 0
    connections: int = 0


@asynccontextmanager
async def cutting_proxy(target: str) -> AsyncIterator[Line]:
    """A line to the server at `target`."""
    line, server_address = Line(), urlsplit(target)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line.connections += 1
        allowed = None
        if line.cuts > 0:
            line.cuts, allowed = line.cuts - 1, line.after
        far_reader, far_writer = await asyncio.open_connection(server_address.hostname, server_address.port)
        sending = asyncio.create_task(_pass_on(reader, far_writer, None))
        with suppress(ConnectionError):
            await _pass_on(far_reader, writer, allowed)
        sending.cancel()
        for end in (writer, far_writer):
            end.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        line.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield line
        server.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowed: int | None) -> None:
    passed = 0
    while (allowed is None or passed < allowed) and (piece := await reader.read(1 << 14)):
        piece = piece if allowed is None else piece[: allowed - passed]
        passed += len(piece)
        writer.write(piece)
        await writer.drain()
