"""Who calls, and whether they may."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.accounts import keys
from app.accounts.keys import Scope
from app.accounts.models import Tenant
from app.kit import clock
from app.parts import Parts
from secateur.problems import ProblemError

_bearer = HTTPBearer(auto_error=False, scheme_name="api_key", description="An API key: `Authorization: Bearer sct_…`")


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant that a request is from, and what its key may do."""

    tenant: Tenant
    key_id: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


class AuthenticatedRoute(APIRoute):
    """A route that finds out who calls before anything of the request is read: a stranger is told nothing but that."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def authenticate(request: Request) -> Response:
            request.state.caller = await _authenticated(request)
            return await handle(request)

        return authenticate


async def _authenticated(request: Request) -> Caller:
    parts: Parts = request.app.state.parts
    credentials = await _bearer(request)
    if credentials is None:
        raise ProblemError(
            "unauthorized",
            "the request has no API key",
            hint="Send it as `Authorization: Bearer sct_…`. `secateur up` names the file that holds the first one.",
        )
    async with parts.database.read() as session:
        key = await keys.find(session, credentials.credentials, keyring=parts.keyring, at=clock.now())
    if key is None:
        raise ProblemError("unauthorized", "the API key is not known, was revoked, or has expired")
    structlog.contextvars.bind_contextvars(tenant=key.tenant.slug, key=key.id)
    return Caller(key.tenant, key.id, frozenset(key.scopes))


async def _caller(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    """Of an `AuthenticatedRoute`; the dependency on the key is what OpenAPI publishes."""
    caller: Caller = request.state.caller
    return caller


AnyCaller = Annotated[Caller, Depends(_caller)]


def _with(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    async def check(caller: AnyCaller) -> Caller:
        if not caller.may(scope):
            raise ProblemError("forbidden", f"the API key lacks the scope {scope}")
        return caller

    return check


JobsReader = Annotated[Caller, Depends(_with(Scope.JOBS_READ))]
JobsWriter = Annotated[Caller, Depends(_with(Scope.JOBS_WRITE))]
ArtifactsReader = Annotated[Caller, Depends(_with(Scope.ARTIFACTS_READ))]
ModelsReader = Annotated[Caller, Depends(_with(Scope.MODELS_READ))]
WebhooksWriter = Annotated[Caller, Depends(_with(Scope.WEBHOOKS_WRITE))]
