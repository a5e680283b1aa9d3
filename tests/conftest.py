"""What all tests share: real servers, one of each a session, and a fresh migrated database for each test."""

from __future__ import annotations

import gc
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from sqlalchemy import make_url

from app.kit.db import Database
from app.kit.migrations import upgrade
from tests.servers import serve_postgresql, serve_valkey

# A machine that stalls for a moment is no fault of what is tested.
hypothesis_settings.register_profile("noisy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("noisy machine")


def pytest_collection_finish() -> None:
    """No run of the engine looks through the modules and tests for garbage: it would take most of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def broker_url() -> Iterator[str]:
    """A Valkey server."""
    with serve_valkey() as url:
        yield url


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL server; its database `postgres` is empty, and tests leave it so."""
    with serve_postgresql() as url:
        yield url


@pytest.fixture(scope="session")
def _postgresql_template(postgresql_url: str) -> str:
    name = "migrated"
    _run(postgresql_url, f"CREATE DATABASE {name}")
    upgrade(_database(postgresql_url, name))
    return name


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sqlite") / "template.sqlite"
    upgrade(f"sqlite+aiosqlite:///{file}")
    return file


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """A migrated SQLite database of this test's own."""
    file = shutil.copy(_sqlite_template, tmp_path / "test.sqlite")
    return f"sqlite+aiosqlite:///{file}"


@pytest.fixture
def postgresql_database_url(postgresql_url: str, _postgresql_template: str) -> Iterator[str]:
    """A migrated PostgreSQL database of this test's own."""
    name = f"test_{uuid4().hex}"
    _run(postgresql_url, f"CREATE DATABASE {name} TEMPLATE {_postgresql_template}")
    yield _database(postgresql_url, name)
    _run(postgresql_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A migrated database; the test runs once on SQLite and once on PostgreSQL."""
    fixture = {"sqlite": "sqlite_url", "postgresql": "postgresql_database_url"}[request.param]
    url: str = request.getfixturevalue(fixture)
    return url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The service's way to the database of this test."""
    database = Database(database_url)
    yield database
    await database.close()


def _database(server_url: str, name: str) -> str:
    return make_url(server_url).set(database=name).render_as_string(hide_password=False)


def _run(server_url: str, statement: str) -> None:
    with psycopg.connect(server_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement.encode())
