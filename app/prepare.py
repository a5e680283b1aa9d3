"""Make an installation ready: tables, first tenant, first key. `python -m app.prepare`; every `secateur up` does it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from app.accounts.bootstrap import bootstrap
from app.kit.db import Database
from app.kit.migrations import upgrade
from app.settings import Settings

log = structlog.get_logger()


async def prepare(settings: Settings) -> Path:
    """Migrate the database and see that there is a first key; the file that holds it. Does nothing the second time."""
    await asyncio.to_thread(upgrade, settings.database_url)
    database = Database(settings.database_url, pooled=False)
    try:
        return await bootstrap(database, settings)
    finally:
        await database.close()


if __name__ == "__main__":
    log.info("prepared", key_file=str(asyncio.run(prepare(Settings()))))
