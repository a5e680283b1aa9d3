"""Tenants' secrets: encrypted when they are stored, decrypted only for the process that needs them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.models import Secret
from app.kit.keyring import Keyring


class SecretName(StrEnum):
    """The secrets that a tenant may store."""

    HUB_TOKEN = "hub_token"  # noqa: S105 (the name of a secret, not one; so is the next)
    MLFLOW_TOKEN = "mlflow_token"  # noqa: S105


async def keep(
    session: AsyncSession, tenant_id: str, name: SecretName, value: str, *, keyring: Keyring, at: datetime
) -> None:
    """Store the tenant's secret in place of the one it had."""
    await session.merge(Secret(tenant_id=tenant_id, name=name, ciphertext=keyring.encrypt(value), updated_at=at))


async def forget(session: AsyncSession, tenant_id: str, name: SecretName) -> None:
    """Delete the tenant's secret, if it has one."""
    await session.execute(delete(Secret).where(Secret.tenant_id == tenant_id, Secret.name == name))


async def secret_of(session: AsyncSession, tenant_id: str, name: SecretName, *, keyring: Keyring) -> str | None:
    """The tenant's secret in plain text, or None.

    Raises `service_unavailable` if it was encrypted with a key that the keyring does not have.
    """
    query = select(Secret.ciphertext).where(Secret.tenant_id == tenant_id, Secret.name == name)
    ciphertext = await session.scalar(query)
    return None if ciphertext is None else keyring.decrypt(ciphertext)
