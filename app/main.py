"""The HTTP service: `uvicorn --factory app.main:create_app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute

from app import health
from app.accounts import endpoints as accounts
from app.artifacts import endpoints as artifacts
from app.integrations import endpoints as integrations
from app.jobs import endpoints as jobs
from app.jobs import estimates, methods
from app.kit import errors, logs
from app.kit.queries import refuse_unknown_parameters
from app.kit.requests import RequestContext, RequestLimits
from app.models import endpoints as models
from app.models import materialize
from app.parts import open_parts
from app.settings import Settings
from app.sweeps import endpoints as sweeps
from app.webhooks import endpoints as webhooks
from secateur import __version__

_DESCRIPTION = (
    "Pruning of large language models as a service: send a model, a method and a sparsity; get back a verified pruned "
    "model. Every error is `application/problem+json`, every list is newest first and paged by cursor, every time is "
    "RFC 3339 in UTC."
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; its parts are opened when it starts and closed when it stops."""
    settings = settings or Settings()
    logs.configure()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_parts(settings) as parts:
            app.state.parts = parts
            app.state.readiness = health.Readiness(health.checks_of(parts))
            yield

    app = FastAPI(
        title="Secateur",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    errors.install(app)
    app.add_middleware(RequestLimits, max_bytes=settings.http.max_body_bytes)
    app.add_middleware(RequestContext)
    app.include_router(_version_1())
    app.include_router(health.router)
    app.webhooks.include_router(webhooks.outgoing)
    return app


def _version_1() -> APIRouter:
    common = errors.declare("unauthorized", "forbidden", "validation_error", "internal_error", "service_unavailable")
    v1 = APIRouter(prefix="/v1", responses=common, dependencies=[Depends(refuse_unknown_parameters)])
    for area in (jobs, estimates, sweeps, artifacts, methods, models, materialize, integrations, webhooks, accounts):
        v1.include_router(area.router)
    return v1


def _operation_id(route: APIRoute) -> str:
    return route.name
