"""Every error of the service in one shape: `application/problem+json` (RFC 9457), whoever raised it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from app.kit.pointers import fault_of
from secateur.problems import KINDS, Fault, ProblemError

MEDIA_TYPE = "application/problem+json"
_MAX_FAULTS = 50
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_RETRY_AFTER = {"idempotency_key_in_flight": "4"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "2"}}

log = structlog.get_logger()


def respond(scope: Scope, problem: ProblemError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The problem as the answer to the request that `scope` is of."""
    document = {**problem.as_document(), "request_id": scope["state"]["request_id"]}
    again = {"Retry-After": _RETRY_AFTER[problem.code]} if problem.code in _RETRY_AFTER else {}
    own = {**_HEADERS.get(problem.kind.status, {}), **again, **(headers or {})}
    return JSONResponse(document, status_code=problem.kind.status, headers=own, media_type=MEDIA_TYPE)


def declare(*codes: str) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` say about the problems that it may answer with."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    statuses = sorted({KINDS[code].status for code in codes})
    return {
        status: {
            "description": "; ".join(f"{KINDS[code].title} (`{code}`)" for code in codes if KINDS[code].status == status),
            "content": {MEDIA_TYPE: schema},
        }
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Have the application answer every error that a handler can see with a problem."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    for error in (OperationalError, InterfaceError, PoolTimeoutError):
        app.add_exception_handler(error, _on_database_error)


async def _on_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemError)  # noqa: S101 (registered for it; so are those below)
    if error.kind.status >= 500:
        log.error("problem", code=error.code, detail=error.detail, exc_info=error)
    return respond(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        wrong = f"the body is no JSON: {errors[0]['ctx']['error']} at character {errors[0]['loc'][1]}"
        return respond(request.scope, ProblemError("bad_request", wrong))
    field = request.scope["route"].body_field
    body, discriminator = (field.field_info.annotation, field.field_info.discriminator) if field else (None, None)
    faults = [fault_of(entry, body, discriminator) for entry in errors[:_MAX_FAULTS]]
    return respond(request.scope, ProblemError("validation_error", _summary(faults, len(errors)), faults=faults))


def _summary(faults: list[Fault], total: int) -> str:
    first = f"{faults[0].pointer or 'the body'}: {faults[0].detail}"
    return first if total == 1 else f"{first} (and {total - 1} more)"


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Those of the framework itself: no such route, method not allowed, body too large or unreadable."""
    assert isinstance(error, HTTPException)  # noqa: S101
    code = _HTTP_CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "internal_error")
    asked = f"{request.method} {request.url.path}"
    details = {"not_found": f"there is nothing at {asked}", "method_not_allowed": f"{asked} is not offered"}
    headers = {"Allow": ", ".join(_offered(request))} if code == "method_not_allowed" else error.headers
    return respond(request.scope, ProblemError(code, details.get(code, str(error.detail))), headers)


def _offered(request: Request) -> list[str]:
    """The methods of the request's path: the framework itself names only those of the first route that it meets."""
    asked = ({**request.scope, "method": method} for method in _METHODS)
    return [scope["method"] for scope in asked if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)]


async def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    log.error("database_away", exc_info=error)
    return respond(request.scope, ProblemError("service_unavailable", "the database does not answer; try again"))
