"""`/v1/secrets`: a tenant's tokens go in, and never come out."""

from __future__ import annotations

from fastapi import APIRouter

from app.accounts import secrets
from app.accounts.auth import AuthenticatedRoute, JobsWriter
from app.accounts.secrets import SecretName
from app.kit import clock
from app.kit.errors import declare
from app.parts import PartsDep
from secateur.problems import at
from secateur.schemas.secrets import SecretValue

router = APIRouter(prefix="/secrets", tags=["secrets"], route_class=AuthenticatedRoute)


@router.put("/{name}", status_code=204, responses=declare("bad_request", "body_too_large"))
async def put_secret(name: SecretName, secret: SecretValue, parts: PartsDep, caller: JobsWriter) -> None:
    """Keep a token that others are asked with on behalf of this tenant, encrypted, in place of the one before."""
    token = secret.value.get_secret_value()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise at("/value", "validation_error", "a token has only printable ASCII characters and no spaces")
    async with parts.database.write() as session:
        await secrets.keep(session, caller.tenant.id, name, token, keyring=parts.keyring, at=clock.now())


@router.delete("/{name}", status_code=204)
async def delete_secret(name: SecretName, parts: PartsDep, caller: JobsWriter) -> None:
    """Forget one of the tenant's tokens, if it is there."""
    async with parts.database.write() as session:
        await secrets.forget(session, caller.tenant.id, name)
