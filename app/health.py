"""`/livez` and `/readyz`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from app.kit.errors import declare
from app.kit.migrations import check_head
from app.parts import Parts
from secateur.problems import ProblemError
from secateur.schemas.health import Health

CHECK_SECONDS = 3.0
REMEMBER_SECONDS = 2.0

Check = Callable[[], Awaitable[object]]

router = APIRouter(tags=["health"])


class Readiness:
    """Asks every part whether it works, at most once in `REMEMBER_SECONDS` whoever wants to know."""

    def __init__(self, checks: Mapping[str, Check], *, seconds: float = CHECK_SECONDS) -> None:
        self._checks = checks
        self._seconds = seconds
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._down: list[str] = []

    async def down(self) -> list[str]:
        """What does not work, each as `name: reason`."""
        async with self._lock:
            if time.monotonic() - self._asked_at > REMEMBER_SECONDS:
                answers = await asyncio.gather(*(_ask(name, check, self._seconds) for name, check in self._checks.items()))
                self._down = [answer for answer in answers if answer]
                self._asked_at = time.monotonic()
            return self._down


def checks_of(parts: Parts) -> Mapping[str, Check]:
    """What has to work for the service to be ready."""
    return {
        "database": lambda: _check_database(parts),
        "broker": lambda: asyncio.to_thread(parts.doorbell.check),
        "store": parts.store.check,
    }


async def _ask(name: str, check: Check, seconds: float) -> str | None:
    try:
        async with asyncio.timeout(seconds):
            await check()
    except TimeoutError:
        return f"{name}: no answer within {seconds:g} seconds"
    except ProblemError as problem:
        return f"{name}: {problem.detail}"
    except Exception as error:  # whatever it is, the part is not ready, and its text may hold an address with a password
        return f"{name}: {type(error).__name__}"
    return None


async def _check_database(parts: Parts) -> None:
    async with parts.database.engine.connect() as connection:
        await connection.run_sync(check_head)


@router.get("/livez")
async def live() -> Health:
    """The process runs and answers."""
    return Health()


def _readiness(request: Request) -> Readiness:
    readiness: Readiness = request.app.state.readiness
    return readiness


@router.get("/readyz", responses=declare("service_unavailable"))
async def ready(readiness: Annotated[Readiness, Depends(_readiness)]) -> Health:
    """Database, migrations, broker and store work."""
    down = await readiness.down()
    if down:
        raise ProblemError("service_unavailable", "not ready: " + "; ".join(down))
    return Health()
