"""What the service is made of while it runs: opened with the application, closed with it, handed to every request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.artifacts.store import Store, open_store
from app.jobs.broadcaster import Broadcaster
from app.jobs.dispatch import Doorbell
from app.kit.db import Database
from app.kit.keyring import Keyring, load_keyring
from app.kit.stopping import watch_for_stop
from app.models.registry import LocalModels
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Parts:
    """Shared by all requests; each opens sessions of its own on `database`."""

    settings: Settings
    database: Database
    keyring: Keyring
    doorbell: Doorbell
    store: Store
    stopping: asyncio.Event
    local_models: LocalModels
    broadcaster: Broadcaster


@asynccontextmanager
async def open_parts(settings: Settings) -> AsyncIterator[Parts]:
    """The parts, for as long as the block lasts."""
    database = Database(settings.database_url, pool_size=settings.database.pool_size)
    doorbell = Doorbell(settings.broker.url)
    try:
        async with open_store(settings.store_url, endpoint=settings.store.endpoint) as store:
            keyring = load_keyring(settings.keyring_file)
            broadcaster = Broadcaster(database, settings.http)
            with watch_for_stop() as stopping:
                broadcasting = asyncio.create_task(broadcaster.run(stopping))
                local_models = LocalModels(settings.models_root)
                try:
                    yield Parts(settings, database, keyring, doorbell, store, stopping, local_models, broadcaster)
                finally:
                    broadcasting.cancel()
    finally:
        await asyncio.to_thread(doorbell.close)
        await database.close()


def _parts_of(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(_parts_of)]
