"""The migrations make exactly the tables that the models declare, and undo them, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from app.kit.db import Base, Database
from app.kit.migrations import check_head, connect, downgrade, load_tables, upgrade
from secateur.problems import ProblemError


def test_migrated_tables_are_those_of_the_models(database_url: str) -> None:
    load_tables()
    with connect(database_url) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        assert set(Base.metadata.tables) <= set(inspect(connection).get_table_names())


def test_down_leaves_nothing_and_up_works_again(database_url: str) -> None:
    downgrade(database_url, "base")
    with connect(database_url) as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
        with pytest.raises(ProblemError, match="revision none"):
            check_head(connection)
    upgrade(database_url)
    with connect(database_url) as connection:
        check_head(connection)


def test_several_processes_may_migrate_at_once(tmp_path: Path, postgresql_database_url: str) -> None:
    downgrade(postgresql_database_url, "base")
    for url in (f"sqlite+aiosqlite:///{tmp_path}/new/folder/db.sqlite", postgresql_database_url):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(upgrade, [url] * 4))
        with connect(url) as connection:
            check_head(connection)


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path, postgresql_database_url: str) -> None:
    downgrade(postgresql_database_url, "base")
    for url in (f"sqlite+aiosqlite:///{tmp_path}/db.sqlite", postgresql_database_url):
        with connect(url) as connection:
            # In the way of the last tables, after most of the migration has run.
            connection.execute(text("CREATE TABLE events (id INTEGER)"))
        with pytest.raises(Exception, match="events"):
            upgrade(url)
        with connect(url) as connection:
            assert set(inspect(connection).get_table_names()) <= {"events", "alembic_version"}


async def test_the_database_itself_refuses_an_unknown_status(database: Database) -> None:
    statement = text("INSERT INTO tenants (id, slug, reads_local_models, created_at) VALUES ('t', 't', false, '2026-01-01')")
    async with database.write() as session:
        await session.execute(statement)
    columns = "id, tenant_id, kind, recipe, model, method, repository, labels, queue, priority, attempt, barren_attempts"
    values = "'j', 't', 'prune', '{}', 'm', 'wanda', 'r', '{}', 'cpu', 0, 0, 0"
    job = (
        f"INSERT INTO jobs ({columns}, blocks_done, event_seq, created_at, queued_at, status) "
        f"VALUES ({values}, 0, 0, '2026-01-01', '2026-01-01', :status)"
    )
    with pytest.raises(IntegrityError, match="ck_jobs_status"):
        async with database.write() as session:
            await session.execute(text(job), {"status": "sleeping"})
    async with database.write() as session:
        await session.execute(text(job), {"status": "queued"})
