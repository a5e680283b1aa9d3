"""The first start of an installation: one tenant, and an admin key for it in a file."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from app.accounts import keys
from app.accounts.models import ApiKey, Tenant
from app.kit import clock
from app.kit.db import Database
from app.kit.ids import new_id
from app.kit.keyring import Keyring, create_private, load_keyring
from app.settings import Settings

DEFAULT_TENANT = "default"
_FILE = "admin.key"


async def bootstrap(database: Database, settings: Settings) -> Path:
    """See that the tenant `default` and its admin key are there, and return the file (mode 0600) that holds the key.

    May be called at every start, by several processes at once. The file comes first: if the database was begun anew, or the
    last start died halfway, the key that the user already has is let in again. A key that was revoked stays so.
    """
    file = settings.state_folder / _FILE
    if not file.exists():
        create_private(file, keys.generate() + "\n")
    key = file.read_text().strip()
    keyring = load_keyring(settings.keyring_file)
    try:
        await _admit(database, key, keyring)
    except IntegrityError:  # another process did the same a moment ago
        await _admit(database, key, keyring)
    return file


async def _admit(database: Database, key: str, keyring: Keyring) -> None:
    at = clock.now()
    async with database.write() as session:
        tenant = await session.scalar(select(Tenant).where(Tenant.slug == DEFAULT_TENANT))
        if tenant is None:
            tenant = Tenant(id=new_id("ten"), slug=DEFAULT_TENANT, reads_local_models=True, created_at=at)
            session.add(tenant)
            await session.flush()
        if await session.scalar(select(ApiKey.id).where(ApiKey.digest == keyring.digest_of(key))) is None:
            keys.add(session, tenant, key, name="admin", scopes={keys.Scope.ADMIN}, keyring=keyring, at=at)
