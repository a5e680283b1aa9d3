"""API keys: `sct_`, 40 random characters, 6 of checksum. What a key is can be told without the database."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Collection
from datetime import datetime
from enum import StrEnum

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.models import ApiKey, Tenant
from app.kit.ids import new_id
from app.kit.keyring import Keyring

PREFIX = "sct_"
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_RANDOM_LENGTH, _CHECKSUM_LENGTH = 40, 6


class Scope(StrEnum):
    """What a key may do; `admin` may do everything."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    ARTIFACTS_READ = "artifacts:read"
    MODELS_READ = "models:read"
    WEBHOOKS_WRITE = "webhooks:write"
    ADMIN = "admin"


def generate() -> str:
    """A new key, with 238 bits of chance in it."""
    random = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_LENGTH))
    return PREFIX + random + _checksum(random)


def is_well_formed(key: str) -> bool:
    """Whether `key` has the form and the checksum of a key: most mistakes are found without asking the database."""
    random, checksum = key[len(PREFIX) : -_CHECKSUM_LENGTH], key[-_CHECKSUM_LENGTH:]
    return key.startswith(PREFIX) and len(random) == _RANDOM_LENGTH and key.isascii() and checksum == _checksum(random)


def _checksum(random: str) -> str:
    number = zlib.crc32(random.encode())
    return "".join(_ALPHABET[number // 62**place % 62] for place in reversed(range(_CHECKSUM_LENGTH)))


def add(
    session: AsyncSession, tenant: Tenant, key: str, *, name: str, scopes: Collection[Scope], keyring: Keyring, at: datetime
) -> ApiKey:
    """Let `key` act for the tenant. Only its digest is stored."""
    row = ApiKey(
        id=new_id("key"),
        tenant_id=tenant.id,
        name=name,
        digest=keyring.digest_of(key),
        last4=key[-4:],
        scopes=sorted(scopes),
        created_at=at,
    )
    session.add(row)
    return row


async def find(session: AsyncSession, key: str, *, keyring: Keyring, at: datetime) -> ApiKey | None:
    """The row of a key that is in force at `at`, with its tenant; None otherwise.

    A key is looked up by its keyed digest, so the time that takes tells nothing about other keys.
    """
    if not is_well_formed(key):
        return None
    row = await session.scalar(select(ApiKey).where(ApiKey.digest == keyring.digest_of(key)))
    if row is None or row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= at):
        return None
    return row


async def in_force(session: AsyncSession, key_ids: Collection[str], *, at: datetime) -> set[str]:
    """Those of `key_ids` whose keys are neither revoked nor expired."""
    lasting = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > at)
    return set(await session.scalars(select(ApiKey.id).where(ApiKey.id.in_(key_ids), ApiKey.revoked_at.is_(None), lasting)))
