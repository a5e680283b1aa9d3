"""Brings a database to the tables that this version of the service wants, and tells whether it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, event, make_url, text

from secateur.problems import ProblemError

_FOLDER = Path(__file__).resolve().parents[2] / "migrations"
# Any number, as long as nobody else locks it.
_LOCK = 0x5EC47E4
_WAIT_SECONDS = 60  # for another process that migrates the same SQLite file
_SYNC_DRIVERS = {"sqlite+aiosqlite": "sqlite"}


def load_tables() -> None:
    """Import every module that declares tables, so that `Base.metadata` knows them all."""
    for package in ("accounts", "artifacts", "integrations", "jobs", "sweeps", "webhooks"):
        import_module(f"app.{package}.models")


def upgrade(url: str, revision: str = "head") -> None:
    """Migrate the database at `url` up to `revision`. Blocks: call it in a thread, or before the loop runs."""
    with connect(url) as connection:
        command.upgrade(_config(connection), revision)


def downgrade(url: str, revision: str) -> None:
    """Migrate the database at `url` down to `revision`; `base` is the empty database."""
    with connect(url) as connection:
        command.downgrade(_config(connection), revision)


def check_head(connection: Connection) -> None:
    """Raises `service_unavailable` unless the database is at the newest revision that this version knows."""
    wanted = sorted(ScriptDirectory(str(_FOLDER)).get_heads())
    found = sorted(MigrationContext.configure(connection).get_current_heads())
    if wanted != found:
        raise ProblemError(
            "service_unavailable",
            f"the database is at revision {', '.join(found) or 'none'}, this version needs {', '.join(wanted)}",
            hint="Run the migrations: `alembic upgrade head` (`secateur up` does so by itself).",
        )


@contextmanager
def connect(url: str) -> Iterator[Connection]:
    """A connection with one open transaction that no other migration runs beside; committed at the end.

    Migrations are synchronous, so the asynchronous driver of the URL is changed for its synchronous twin.
    """
    parsed = make_url(url)
    driver = _SYNC_DRIVERS.get(parsed.drivername, parsed.drivername)
    waiting = {"timeout": _WAIT_SECONDS} if parsed.get_backend_name() == "sqlite" else {}
    engine = create_engine(parsed.set(drivername=driver), poolclass=NullPool, connect_args=waiting)
    if engine.dialect.name == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        event.listen(engine, "connect", lambda raw, _: setattr(raw, "isolation_level", None))
        event.listen(engine, "begin", lambda opened: opened.exec_driver_sql("BEGIN IMMEDIATE"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            # From here on: rather fail than stand in the way of those who work.
            connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        yield connection


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    config.attributes["connection"] = connection
    return config
