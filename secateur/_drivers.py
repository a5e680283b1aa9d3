"""Carry the client's conversation out over HTTP: in the caller's thread, or on an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack, ExitStack, closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx2

from secateur import __version__
from secateur._http import Call, Emit, Open, Pause, Read, Reply, Request, Stream, Work
from secateur.connection import Connection
from secateur.errors import UnreachableError

Step = TypeVar("Step")
T = TypeVar("T")


class Driver:
    """Carries out the steps of calls, one after the other, in the caller's thread."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._timeout = timeout
        self.http = httpx2.Client(base_url=connection.url, headers=_headers(connection))

    def run(self, call: Call[T]) -> T:
        with closing(call):
            step = _resume(call)
            while not isinstance(step, _Result):
                step = _resume(call, self._do(step))
            return step.value

    def iterate(self, stream: Stream[T]) -> Iterator[T]:
        body: Iterator[bytes] = iter(())
        with closing(stream), ExitStack() as opened:
            step = _resume(stream)
            while not isinstance(step, _Result):
                answer: Any = None
                match step:
                    case Emit():
                        yield step.item
                    case Open():
                        opened.close()
                        answer, body = self._open(opened, step.request)
                    case Read():
                        answer = self._read(body)
                    case _:
                        answer = self._do(step)
                step = _resume(stream, answer)

    def _open(self, opened: ExitStack, request: Request) -> tuple[Reply | UnreachableError, Iterator[bytes]]:
        """Send a request; its answer and, if that is a good one, the pieces of its body while `opened` is open."""
        try:
            response = opened.enter_context(self.http.stream(**_arguments(request, self._timeout)))
            head = _head(response)
            if response.is_error:
                return Reply(head.status, head.headers, response.read()), iter(())
            return head, response.iter_raw()
        except httpx2.HTTPError as error:
            return _unreachable(self.http.base_url, error), iter(())

    @staticmethod
    def _read(body: Iterator[bytes]) -> bytes:
        try:
            return next(body, b"")
        except httpx2.HTTPError:
            return b""

    def _do(self, step: Request | Pause | Work) -> Any:
        match step:
            case Request():
                return self._send(step)
            case Pause():
                return time.sleep(step.seconds)
            case Work():
                return step.function()

    def _send(self, request: Request) -> Reply | UnreachableError:
        try:
            with self.http.stream(**_arguments(request, self._timeout)) as response:
                head = _head(response)
                if request.into is None or response.is_error:
                    return Reply(head.status, head.headers, response.read())
                write = request.into(head)
                # Pieces as they come: one that was gathered up to a size would be lost when the line breaks.
                for piece in response.iter_raw():
                    write(piece)
                return head
        except httpx2.HTTPError as error:
            return _unreachable(self.http.base_url, error)


class AsyncDriver:
    """Carries out the steps of calls on an event loop; what blocks goes to a thread."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._timeout = timeout
        self.http = httpx2.AsyncClient(base_url=connection.url, headers=_headers(connection))

    async def run(self, call: Call[T]) -> T:
        with closing(call):
            step = _resume(call)
            while not isinstance(step, _Result):
                step = _resume(call, await self._do(step))
            return step.value

    async def iterate(self, stream: Stream[T]) -> AsyncIterator[T]:
        body: AsyncIterator[bytes] | None = None
        with closing(stream):
            async with AsyncExitStack() as opened:
                step = _resume(stream)
                while not isinstance(step, _Result):
                    answer: Any = None
                    match step:
                        case Emit():
                            yield step.item
                        case Open():
                            await opened.aclose()
                            answer, body = await self._open(opened, step.request)
                        case Read():
                            answer = await self._read(body)
                        case _:
                            answer = await self._do(step)
                    step = _resume(stream, answer)

    async def _open(
        self, opened: AsyncExitStack, request: Request
    ) -> tuple[Reply | UnreachableError, AsyncIterator[bytes] | None]:
        """Send a request; its answer and, if that is a good one, the pieces of its body while `opened` is open."""
        try:
            response = await opened.enter_async_context(self.http.stream(**_arguments(request, self._timeout)))
            head = _head(response)
            if response.is_error:
                return Reply(head.status, head.headers, await response.aread()), None
            return head, response.aiter_raw()
        except httpx2.HTTPError as error:
            return _unreachable(self.http.base_url, error), None

    @staticmethod
    async def _read(body: AsyncIterator[bytes] | None) -> bytes:
        try:
            return await anext(body, b"") if body is not None else b""
        except httpx2.HTTPError:
            return b""

    async def _do(self, step: Request | Pause | Work) -> Any:
        match step:
            case Request():
                return await self._send(step)
            case Pause():
                return await asyncio.sleep(step.seconds)
            case Work():
                return await asyncio.to_thread(step.function)

    async def _send(self, request: Request) -> Reply | UnreachableError:
        try:
            async with self.http.stream(**_arguments(request, self._timeout)) as response:
                head = _head(response)
                if request.into is None or response.is_error:
                    return Reply(head.status, head.headers, await response.aread())
                write = request.into(head)
                async for piece in response.aiter_raw():
                    await asyncio.to_thread(write, piece)
                return head
        except httpx2.HTTPError as error:
            return _unreachable(self.http.base_url, error)


@dataclass(frozen=True, slots=True)
class _Result(Generic[T]):
    value: T


def _resume(call: Generator[Step, Any, T], answer: Any = None) -> Step | _Result[T]:
    """The call's next step, or what it returned."""
    try:
        return call.send(answer)
    except StopIteration as end:
        return _Result(end.value)


def _headers(connection: Connection) -> dict[str, str]:
    return {
        "Authorization": f"Bearer {connection.key}",
        "User-Agent": f"secateur/{__version__}",
        "Accept": "application/json",
    }


def _arguments(request: Request, timeout: float) -> dict[str, Any]:
    return {
        "method": request.method,
        "url": request.path,
        "params": list(request.parameters),
        "json": request.json,
        "headers": dict(request.headers),
        "timeout": timeout + request.patience,
        # Bytes may lie elsewhere; a redirect to another host is not shown the key.
        "follow_redirects": request.into is not None,
    }


def _head(response: httpx2.Response) -> Reply:
    return Reply(response.status_code, {name.lower(): value for name, value in response.headers.items()})


def _unreachable(url: httpx2.URL, error: httpx2.HTTPError) -> UnreachableError:
    return UnreachableError(f"The service at {url} cannot be reached: {str(error) or type(error).__name__}")
