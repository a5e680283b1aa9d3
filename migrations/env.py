"""Runs the migrations, in one transaction, on the database of the settings or on the one that `app.kit.migrations` names.

Several processes may begin at once: one migrates, the others wait and find nothing left to do.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from app.kit.db import Base
from app.kit.migrations import connect, load_tables
from app.settings import Settings

load_tables()


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transactional_ddl=True,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with connect(Settings().database_url) as connection:
        run(connection)
