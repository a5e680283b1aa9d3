"""`/v1/secrets`: a tenant's hub token goes in, and never comes out."""

from __future__ import annotations

from fastapi import APIRouter

from app.accounts import secrets
from app.accounts.auth import AuthenticatedRoute, JobsWriter
from app.kit import clock
from app.kit.errors import declare
from app.parts import PartsDep
from secateur.problems import at
from secateur.schemas.secrets import SecretValue

router = APIRouter(prefix="/secrets", tags=["secrets"], route_class=AuthenticatedRoute)


@router.put("/hub_token", status_code=204, responses=declare("bad_request", "body_too_large"))
async def put_hub_token(secret: SecretValue, parts: PartsDep, caller: JobsWriter) -> None:
    """Keep the token that the hub is asked with on behalf of this tenant, encrypted, in place of the one before."""
    token = secret.value.get_secret_value()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise at("/value", "validation_error", "a token has only printable ASCII characters and no spaces")
    async with parts.database.write() as session:
        await secrets.keep(session, caller.tenant.id, secrets.HUB_TOKEN, token, keyring=parts.keyring, at=clock.now())


@router.delete("/hub_token", status_code=204)
async def delete_hub_token(parts: PartsDep, caller: JobsWriter) -> None:
    """Forget the tenant's hub token, if there is one."""
    async with parts.database.write() as session:
        await secrets.forget(session, caller.tenant.id, secrets.HUB_TOKEN)
