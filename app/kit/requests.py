"""What surrounds every request: its id, its line in the log, the limit of its body, and the net below its handler."""

from __future__ import annotations

import re
import time

import structlog
from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.kit import errors
from app.kit.ids import new_id
from secateur.problems import ProblemError

REQUEST_ID = "X-Request-Id"
_GIVEN_ID = re.compile(r"[\w.\-]{1,64}", re.ASCII)

log = structlog.get_logger()


class RequestContext:
    """Gives each request an id (the client's `X-Request-Id` if it is a decent one), names it in every line of the log and
    in the answer, and answers what no handler caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _GIVEN_ID.fullmatch(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            except ClientDisconnect:
                log.info("client_gone")
            except Exception:
                log.exception("unforeseen_error")
                if not status:
                    unforeseen = ProblemError("internal_error", f"an unforeseen error; its id is {request_id}")
                    await errors.respond(scope, unforeseen)(scope, receive, send_with_id)
            finally:
                milliseconds = round(1000 * (time.perf_counter() - started), 1)
                log.info("request", method=scope["method"], path=scope["path"], status=status, milliseconds=milliseconds)


class RequestLimits:
    """Refuses bodies of more than `max_bytes` without keeping them, and addresses with a NUL in them.

    The connection stays open: a server that closes it while the client still sends makes the client miss the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (problem := self._problem_of(scope)) is not None:
            await errors.respond(scope, problem)(scope, receive, send)
            return
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self._too_large.detail)
            return message

        await self.app(scope, receive_some, send)

    def _problem_of(self, scope: Scope) -> ProblemError | None:
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            return self._too_large
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            # PostgreSQL has no such character in its texts.
            return ProblemError("bad_request", "the address holds a NUL character")
        return None

    @property
    def _too_large(self) -> ProblemError:
        return ProblemError("body_too_large", f"a body may have {self.max_bytes} bytes")
