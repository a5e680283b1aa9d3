"""The service over real HTTP: one on a free port for each test, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import uvicorn
from sqlalchemy import select

from app.accounts.bootstrap import bootstrap
from app.accounts.models import Tenant
from app.kit.db import Database
from app.kit.keyring import Keyring, load_keyring
from app.main import create_app
from app.settings import BrokerSettings, DatabaseSettings, Settings
from tests.api.models import write_model


@dataclass(frozen=True)
class Service:
    """A service that runs, a client with the admin key of its tenant `default`, and what lies behind it."""

    client: httpx2.AsyncClient
    settings: Settings
    database: Database
    keyring: Keyring
    tenant: Tenant

    def client_with(self, key: str) -> httpx2.AsyncClient:
        """Another client; the test closes it."""
        return httpx2.AsyncClient(base_url=self.client.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


@pytest.fixture
def settings(tmp_path: Path, database_url: str, broker_url: str) -> Settings:
    """All state of a service in a folder of this test's own, with the model `tiny` in it."""
    write_model(tmp_path / "state" / "models" / "tiny")
    database, broker = DatabaseSettings(url=database_url), BrokerSettings(url=broker_url)
    return Settings(state=tmp_path / "state", database=database, broker=broker)


@pytest.fixture
async def service(settings: Settings, database: Database) -> AsyncIterator[Service]:
    """A service with a tenant."""
    async with serve_with_tenant(settings, database) as service:
        yield service


@asynccontextmanager
async def serve_with_tenant(settings: Settings, database: Database) -> AsyncIterator[Service]:
    """A service with these settings, and a tenant."""
    key = (await bootstrap(database, settings)).read_text().strip()
    async with database.read() as session:
        tenant = (await session.scalars(select(Tenant))).one()
    async with (
        serve(settings) as url,
        httpx2.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client,
    ):
        yield Service(client, settings, database, load_keyring(settings.keyring_file), tenant)


@asynccontextmanager
async def serve(settings: Settings) -> AsyncIterator[str]:
    """The URL of a service with these settings."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None, ws="none", access_log=False))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            assert not running.done(), "the service did not start"
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await running
